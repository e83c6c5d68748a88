"""The record that a cluster keeps of the job that this process is: its result is written into it.

What a job prints lies on the node that it ran on, and goes with it. The record is the head's, and a head that keeps its
state still has it when it is started again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from dataclasses import replace
from typing import Any

RESULT_KEY = "cvft_result"
MAX_CHARACTERS = 20_000
"""Of a result that is written down: whoever lists jobs reads the records of all."""
_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray tells the process of a job that was submitted
_TIMEOUT_S = 10


def keep_result(result: dict[str, Any]) -> None:
    """Write the result into this job's record; nothing where this process is no submitted job, or it is long."""
    metadata = json.loads(os.environ.get(_CONFIG, "{}")).get("metadata", {})
    job_id, text = metadata.get("job_submission_id"), json.dumps(result)
    if job_id is not None and len(text) <= MAX_CHARACTERS:
        asyncio.run(_write(job_id, text))


async def _write(job_id: str, text: str) -> None:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # noqa: PLC0415 (some jobs use no Ray)
    from ray.dashboard.modules.job.common import JobInfoStorageClient  # noqa: PLC0415
    from ray.exceptions import RpcError  # noqa: PLC0415

    try:
        records = JobInfoStorageClient(GcsClient(address=os.environ["RAY_ADDRESS"]))
        record = await records.get_info(job_id, timeout=_TIMEOUT_S)
        if record is not None:
            kept = replace(record, metadata={**(record.metadata or {}), RESULT_KEY: text})
            await records.put_info(job_id, kept, timeout=_TIMEOUT_S)
    except RpcError as error:
        logging.getLogger("cvft").warning("the head does not take the result, which is printed alone: %s", error)
