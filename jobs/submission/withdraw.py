"""End a job that has not begun: a program that Ray runs on the head, as a job of its own, with the job's id.

Ray's own stop is heard by the process that runs a job, and so not before there is room for it; until then its demand
brings nodes. The program is sent as text (`JobServer.withdraw`): it needs nothing but Ray there.
"""

from __future__ import annotations

import asyncio
import os
import sys

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.dashboard.modules.job.common import (
    JOB_ACTOR_NAME_TEMPLATE,
    SUPERVISOR_ACTOR_RAY_NAMESPACE,
    JobInfoStorageClient,
)
from ray.job_submission import JobStatus


async def _withdraw(job_id: str) -> None:
    records = JobInfoStorageClient(GcsClient(address=os.environ["RAY_ADDRESS"]))
    if await records.get_status(job_id) != JobStatus.PENDING:
        return
    await records.put_status(job_id, JobStatus.STOPPED)  # first: Ray takes the end of what is over for meant
    ray.init(log_to_driver=False)
    try:
        process = ray.get_actor(JOB_ACTOR_NAME_TEMPLATE.format(job_id=job_id), namespace=SUPERVISOR_ACTOR_RAY_NAMESPACE)
    except ValueError:  # it was lost with the head that took it
        return
    ray.kill(process)
    # If it began at this very moment it has written so.
    if await records.get_status(job_id) == JobStatus.RUNNING:
        await records.put_status(job_id, JobStatus.STOPPED)


if __name__ == "__main__":
    asyncio.run(_withdraw(sys.argv[1]))
