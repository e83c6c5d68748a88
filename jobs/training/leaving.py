"""When a group of workers leaves between two steps, so that another one may go on from that very step.

Either a node of theirs is about to be taken away (a spot instance, a drain), or an elastic training has room for more
workers. Ray itself would wait for the first and end the workers in the middle of a step for the second.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import ray.train
import ray.train.collective

from cvft.distributed import current_world
from jobs.entry import LOGGER
from jobs.room import has_room

NOTICE = "a node is about to go"
ROOM = "there is room for more workers"


class Leaving:
    """Asks Ray each so many steps; called on every rank after every step, it tells all of them the same.

    Attributes:
        reason: Why to leave, `NOTICE` or `ROOM`; "" while there is no reason.
    """

    def __init__(
        self,
        *,
        every_steps: int,
        max_workers: int,
        resources: Mapping[str, float],
        labels: Mapping[str, str],
        room_s: float,
    ) -> None:
        """Begin to look.

        Args:
            every_steps: Number of steps between two questions; each is a round trip to an actor by all ranks.
            max_workers: Number of workers from which on no more are wanted.
            resources: What one worker needs.
            labels: Labels of the nodes that workers run on.
            room_s: Time that there must have been room for another worker.
        """
        self.reason = ""
        self._every_steps = every_steps
        self._max_workers = max_workers
        self._resources = resources
        self._labels = labels
        self._room_s = room_s
        self._room_since: float | None = None
        self._world = current_world()

    def __call__(self, step: int) -> bool:
        """Tell whether to leave after so many steps of the training."""
        if step % self._every_steps == 0:
            self.reason = self._ask(step)
        return self.reason != ""

    def _ask(self, step: int) -> str:
        notice = ray.train.get_preemption_info()
        if notice is not None:
            if self._world.rank == 0:
                nodes = ", ".join(notice.preempted_node_ids)
                LOGGER.warning("node %s is about to go: saving at step %d and leaving", nodes, step)
            return NOTICE
        if self._world.size >= self._max_workers:
            return ""
        has_room = self._has_had_room() if self._world.rank == 0 else None
        return ROOM if ray.train.collective.broadcast_from_rank_zero(has_room) else ""

    def _has_had_room(self) -> bool:
        now = time.monotonic()
        if not has_room(self._resources, self._labels):
            self._room_since = None
            return False
        if self._room_since is None:
            self._room_since = now
        if now - self._room_since < self._room_s:
            return False
        LOGGER.info("%s than %d: saving and starting again with more", ROOM, self._world.size)
        return True
