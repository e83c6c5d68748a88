"""The Ray that a job runs on: the cluster it was submitted to or that RAY_ADDRESS names, else one on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import ray

from cvft.configuration import require
from cvft.errors import ClusterError
from jobs.entry import LOGGER
from jobs.room import await_room

Argument = TypeVar("Argument")
Result = TypeVar("Result")

_NUM_STARTS = 4
_NUM_RETRIES = 3


@contextlib.contextmanager
def ray_session(*, num_cpus: int = 1, has_dashboard: bool = True) -> Iterator[None]:
    """Be connected to Ray inside the block; a Ray started here ends with it, one that was there stays.

    Args:
        num_cpus: CPUs that a Ray started here offers at the least, so that a machine with fewer cores does not wait
            for cores it will never have.
        has_dashboard: Whether a Ray started here has its dashboard. Ray Train asks its state API whether a training is
            still alive; plain tasks do without, and Ray starts sooner.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        LOGGER.info("joining the Ray cluster at %s", address)
        try:
            ray.init(configure_logging=False)
        except ConnectionError as error:
            reason = " ".join(str(error).split())
            raise ClusterError(f"RAY_ADDRESS={address}: no Ray cluster answers there: {reason}") from error
    else:
        # Ray 2.60 turns on token authentication unless told; this Ray listens to this machine alone.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cpus = max(os.cpu_count() or 1, num_cpus)
        LOGGER.info("starting Ray on this machine with %d CPUs", cpus)
        start_ray(num_cpus=cpus, include_dashboard=has_dashboard)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def ray_session_with_room(*, what: str, labels: Mapping[str, str] | None = None) -> Iterator[None]:
    """Be connected to Ray inside the block, once it has room for a task of one CPU.

    Args:
        what: The option that says where tasks run, for messages.
        labels: Labels of the nodes to run on.

    Raises:
        ClusterError: There is no Ray, or no such room now or later.
    """
    with ray_session(has_dashboard=False):
        await_room(1, {"CPU": 1}, what=what, labels=labels)
        yield


def on_a_node(
    function: Callable[[Argument], Result],
    argument: Argument,
    *,
    use_gpu: bool,
    labels: Mapping[str, str],
    what: str,
) -> Result:
    """Call a function on a node of the cluster that RAY_ADDRESS names, or here if it names none.

    A node that is lost meanwhile is replaced by another one, so the function must bear to be called again.

    Args:
        function: What to call; it and its argument travel to the node.
        argument: Its argument.
        use_gpu: Whether the node must have a GPU to spare; here it takes what there is.
        labels: Labels of the node.
        what: The option that asks for them, for messages.

    Raises:
        ClusterError: There is no such node, now or later, or nodes were lost again and again.
    """
    if not os.environ.get("RAY_ADDRESS"):
        require(not labels, f"{what}: there are no nodes to choose from; submit the job, or set RAY_ADDRESS")
        return function(argument)
    with ray_session():
        resources = {"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1}
        await_room(1, resources, what=what, labels=labels)
        task = ray.remote(num_cpus=1, num_gpus=int(use_gpu), max_retries=_NUM_RETRIES, label_selector=dict(labels))
        try:
            return cast(Result, ray.get(task(function).remote(argument)))
        except (ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ClusterError(f"its node was lost {_NUM_RETRIES + 1} times: {reason}") from error


def start_ray(**options: Any) -> None:
    """Start Ray on this machine; where that is very busy its parts miss their own deadline of 30 s: it is tried again.

    Args:
        **options: Of `ray.init`.

    Raises:
        ClusterError: It did not start in time, nor when tried again.
    """
    for attempt in range(1, _NUM_STARTS + 1):
        try:
            ray.init("local", configure_logging=False, **options)
        except Exception as error:  # Ray has no error of its own for it
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
            if attempt == _NUM_STARTS:
                load = os.getloadavg()[0]
                raise ClusterError(f"Ray did not start within 30 s, {attempt} times (load {load:.0f})") from error
            LOGGER.warning("Ray did not start within 30 s; trying again")
        else:
            return
