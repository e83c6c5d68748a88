"""Ray Train's coordinator: the actor that keeps the nodes of all trainings of a cluster apart, and asks for more.

Ray Train starts it once and never ends it. How many workers an elastic training begins with is what the coordinator
knows of the cluster's nodes, at which it looks each 20 s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.train import UserCallback

_NAME = "AutoscalingCoordinator"  # and its namespace, in Ray 2.60
_NOBODY = "nobody"
_PATIENCE_S = 10.0


def coordinator_on_head() -> None:
    """Start the coordinator on the head, unless it runs.

    Ray Train would start it on the driver's node, which may go: one of the autoscaler's if the driver is a trial of a
    search, or was submitted with a need of its own. A node that it runs on counts as busy for ever.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (  # noqa: PLC0415 (takes a second)
        _AutoscalingCoordinatorActor,
    )

    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_AutoscalingCoordinatorActor)
    actor.options(
        name=_NAME,
        namespace=_NAME,
        get_if_exists=True,
        lifetime="detached",
        resources={HEAD_NODE_RESOURCE_NAME: 0.001},
        scheduling_strategy="DEFAULT",  # outside of the placement group of a trial of Tune
    ).remote()


def look_anew() -> None:
    """Let the coordinator look at the nodes now, if it runs and answers."""
    with contextlib.suppress(ValueError, ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        coordinator = ray.get_actor(_NAME, namespace=_NAME)
        ray.get(coordinator.get_reserved_resources.remote(_NOBODY, recompute=True), timeout=_PATIENCE_S)


class LookAnew(UserCallback):  # type: ignore[misc]  # Ray has no type hints here
    """Has an elastic training that lost workers start with those that there is room for, not with those there were."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Look before Ray Train decides how many follow."""
        look_anew()
