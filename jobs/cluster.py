"""The Ray that a job runs on: the cluster it was submitted to or that RAY_ADDRESS names, else one on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import ray

from cvft.errors import ClusterError
from jobs.entry import LOGGER

_NUM_STARTS = 4


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
            ray.init()
        except ConnectionError as error:
            reason = " ".join(str(error).split())
            raise ClusterError(f"RAY_ADDRESS={address}: no Ray cluster answers there: {reason}") from error
    else:
        # Ray 2.60 turns on token authentication unless told; this Ray listens to this machine alone.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cpus = max(os.cpu_count() or 1, num_cpus)
        LOGGER.info("starting Ray on this machine with %d CPUs", cpus)
        _start(num_cpus=cpus, include_dashboard=has_dashboard)
    try:
        yield
    finally:
        ray.shutdown()


def _start(*, num_cpus: int, include_dashboard: bool) -> None:
    """Start Ray; on a very busy machine its parts miss their own deadline of 30 s and it is tried again."""
    for attempt in range(1, _NUM_STARTS + 1):
        try:
            ray.init("local", num_cpus=num_cpus, include_dashboard=include_dashboard, configure_logging=False)
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
