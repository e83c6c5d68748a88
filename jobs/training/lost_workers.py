"""What a training on Ray says of workers that it loses: who, why, and what it waits for until it goes on.

Ray tells it in some hundred lines of its own; these are one each. `LostWorkers` speaks in Ray Train's controller, whose
output Ray shows among the job's; the waiting is seen from the driver, as the controller itself waits.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any, cast

import ray
import torch.distributed as dist
from ray.exceptions import RayActorError, RayTaskError
from ray.train import TrainingFailedError, UserCallback, WorkerGroupError
from ray.train.v2._internal.exceptions import CollectiveTimeoutError, WorkerHealthCheckFailedError
from ray.util.placement_group import placement_group_table

from jobs.entry import LINE_INTERVAL_S, LOGGER
from jobs.room import describe_room

_MAX_CHARACTERS = 200


class NotMetError(WorkerGroupError):  # type: ignore[misc]  # Ray has no type hints here
    """The workers of a group did not find each other."""


class LostWorkers(UserCallback):  # type: ignore[misc]  # Ray has no type hints here
    """Tells of each failure of a group of workers."""

    def __init__(self, *, max_failures: int) -> None:
        """Count from none; so many are allowed."""
        self._max_failures = max_failures
        self._number = 0

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Say what happened, and what comes next."""
        what = describe_failures(worker_exceptions)
        if any(_is_preempted(error) for error in worker_exceptions.values()):
            LOGGER.warning("%s; that was announced and does not count", what)
            return
        self._number += 1
        follows = "all workers start again from the newest checkpoint"
        if self._number > self._max_failures:
            follows = "the training ends"
        LOGGER.warning("%s; failure %d of train.max_failures=%d: %s", what, self._number, self._max_failures, follows)


def describe_failures(errors: Mapping[int, Exception]) -> str:
    """Say in one line what happened to which ranks."""
    return ", ".join(f"rank {rank} {_describe(error)}" for rank, error in sorted(errors.items()))


def is_loss(error: TrainingFailedError) -> bool:
    """Tell whether a group ended because a process, a node or the network was lost, not by an error of its own."""
    if not isinstance(error, WorkerGroupError):
        return False
    failures = error.worker_failures.values()
    return isinstance(error, NotMetError) or any(
        isinstance(_cause(failure), RayActorError) or _is_of_the_network(failure) for failure in failures
    )


def _describe(error: Exception) -> str:
    cause = _cause(error)
    text = str(cause).strip()
    waited = re.search(r"gloo.*Timed out waiting (\d+)ms", text)
    if waited:
        seconds = int(waited[1]) / 1000
        return f"waited {seconds:g} s for another worker, which hangs or is out of reach (train.collective_timeout_s)"
    if not isinstance(cause, RayActorError):
        first = text.splitlines()[0] if text else ""
        return f"met {type(cause).__name__}: {first[:_MAX_CHARACTERS]}"
    place = re.search(r"^\s*ip: (\S+)", text, re.MULTILINE)
    where = f" on {place[1]}" if place else ""
    if "its node has died" not in text:
        return f"was lost{where}: its process ended"
    reason = text.splitlines()[-1].rpartition(": ")[2]
    return f"was lost{where}: its node does not answer, or is gone ({reason[:_MAX_CHARACTERS]})"


def _cause(error: Exception) -> Exception:
    if isinstance(error, RayTaskError):
        return cast(Exception, error.cause)
    return cast(Exception, error.health_check_failure) if isinstance(error, WorkerHealthCheckFailedError) else error


def _is_preempted(error: Exception) -> bool:
    cause = _cause(error)
    return isinstance(cause, RayActorError) and cause.preempted


def _is_of_the_network(error: Exception) -> bool:
    """Tell whether a collective failed, torch's or Ray's: gloo has no type of error for it."""
    is_of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return is_of_gloo or isinstance(_cause(error), (dist.DistError, CollectiveTimeoutError))


@contextlib.contextmanager
def waiting_is_told(labels: Mapping[str, str]) -> Iterator[None]:
    """Within it, a line is logged each ten seconds in which workers of this job wait for room.

    Args:
        labels: Labels of the nodes that they run on.
    """
    is_over = threading.Event()

    def tell() -> None:
        while not is_over.wait(LINE_INTERVAL_S):
            for bundles in _waiting():
                LOGGER.info("the workers wait for %d x %s: %s", len(bundles), bundles[0], describe_room(labels))

    teller = threading.Thread(target=tell, name="waiting", daemon=True)
    teller.start()
    try:
        yield
    finally:
        is_over.set()
        teller.join()


def _waiting() -> list[list[str]]:
    """Return what each placement group of this job asks for that has no room, bundle by bundle."""
    job = ray.get_runtime_context().get_job_id()  # the end of the ids of what it asks for
    groups = (
        group
        for name, group in placement_group_table().items()
        if name.endswith(job) and group["state"] in ("PENDING", "RESCHEDULING")
    )
    return [
        [" + ".join(f"{amount:g} {name}" for name, amount in bundle.items()) for bundle in group["bundles"].values()]
        for group in groups
    ]
