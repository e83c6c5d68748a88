"""What a training on Ray would leave behind on a cluster, so that nodes stay for nobody: taken back here.

Ray Train asks the autoscaler for a training's nodes by `request_resources`, through an actor that it starts once for
all trainings of a cluster and never ends. A request that nobody takes back holds its nodes for 200 s, and a node that
the actor itself runs on counts as busy for ever.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME

_COORDINATOR = "AutoscalingCoordinator"  # its name and its namespace in Ray 2.60
_PATIENCE_S = 10.0


def coordinator_on_head() -> None:
    """Start Ray Train's coordinator of requests on the head, unless it runs.

    Ray Train would start it on the driver's node, which may go: one of the autoscaler's if the driver is a trial of a
    search, or was submitted with a need of its own.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (  # noqa: PLC0415 (takes a second)
        _AutoscalingCoordinatorActor,
    )

    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_AutoscalingCoordinatorActor)
    actor.options(
        name=_COORDINATOR,
        namespace=_COORDINATOR,
        get_if_exists=True,
        lifetime="detached",
        resources={HEAD_NODE_RESOURCE_NAME: 0.001},
        scheduling_strategy="DEFAULT",  # outside of the placement group of a trial of Tune
    ).remote()


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, which `ray job stop` sends, be Ctrl-C, in the main thread; a trial has others, which Tune ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def abort(controller: Any) -> None:
    """End the workers of a training and take its request back, by Ray Train's controller of it."""
    with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):  # it ends itself in the end
        ray.get(controller.abort.remote(), timeout=_PATIENCE_S)
