"""One job on a cluster, as its record tells of it, and how a new one is to be run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails, JobStatus

from jobs.submission.record import RESULT_KEY

_NODE_LOST = "JOB_SUPERVISOR_ACTOR_DIED"
_NOT_STARTED = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"
_SUPERVISOR = "JOB_SUPERVISOR_ACTOR_"


@dataclass(frozen=True)
class Attempt:
    """One job on the cluster.

    Attributes:
        id: Its submission id.
        driver_job_id: Ray's number for what its process has begun; none before that, or where it uses no Ray.
        result: What it has written down as its result.
        is_lost: Whether it ended because its node did, or the head that took it.
        is_not_started: Whether it ended before it began: Ray gave it up because no room came in time, or it was lost.
    """

    id: str
    driver_job_id: str | None
    status: str
    entrypoint: str
    message: str
    exit_code: int | None
    metadata: Mapping[str, str]
    needs: Mapping[str, float]
    labels: Mapping[str, str]
    result: dict[str, Any] | None
    is_lost: bool
    is_not_started: bool
    started_ms: int

    @classmethod
    def of(cls, details: JobDetails) -> Attempt:
        """Take what is used from Ray's record."""
        metadata = details.metadata or {}
        kind = str(details.error_type or "")
        # A head that was started again finds no trace of the process that watched over a job which had begun.
        is_lost = kind == _NODE_LOST or (kind.startswith(_SUPERVISOR) and details.driver_node_id is not None)
        return cls(
            id=str(details.submission_id),
            driver_job_id=details.job_id,
            status=str(details.status.value),
            entrypoint=details.entrypoint,
            message=" ".join((details.message or "").split()),
            exit_code=details.driver_exit_code,
            metadata=metadata,
            needs={name: float(value) for name, value in json.loads(metadata.get("cvft_needs", "{}")).items()},
            labels=json.loads(metadata.get("cvft_labels", "{}")),
            result=json.loads(metadata.get(RESULT_KEY, "null")),
            is_lost=is_lost,
            is_not_started=kind == _NOT_STARTED,
            started_ms=details.start_time or 0,
        )

    @property
    def is_over(self) -> bool:
        """Whether it will not change any more."""
        return bool(JobStatus(self.status).is_terminal())


@dataclass(frozen=True)
class Request:
    """How a submission is to be run.

    Attributes:
        archive: The code that is sent; none runs what the nodes hold.
        variables: What is added to the environment of its processes.
        needs: CPU and GPU for the job's own process.
        labels: Of the node that it runs on.
        metadata: What is kept with it besides.
    """

    archive: Path | None
    variables: Mapping[str, str]
    needs: Mapping[str, float]
    labels: Mapping[str, str]
    metadata: Mapping[str, str]
