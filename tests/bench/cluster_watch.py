"""Looks at a cluster of `infra/local/cluster.sh`: nodes, what runs on them, what jobs leave behind; and kills nodes.

The nodes are processes of this machine, so what runs on one is read from their environments and titles.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util import state

_EVERY_S = 0.5
_RAYS_OWN = ("AutoscalingCoordinator", "TrainStateActor")  # names of its actors that outlive trainings, see `held`
_NO_WORK = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass(frozen=True)
class Node:
    """A node that the autoscaler added; its id is the same for Ray and for its provider."""

    group: str
    identity: str

    def processes(self) -> dict[int, str]:
        """Numbers and titles of its processes."""
        mark, found = f"RAY_CLOUD_INSTANCE_ID={self.identity}".encode(), {}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # a process that has just ended, or is not ours
                if mark in environ.read_bytes().split(b"\0"):
                    title = (environ.parent / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(environ.parent.name)] = title.decode(errors="replace").strip()
        return found

    def work(self) -> list[str]:
        """Tasks and actors that run on it now: the titles that Ray gives their processes."""
        titles = (title for title in self.processes().values() if title.startswith("ray::"))
        return sorted(title.split()[0] for title in titles if not title.startswith(_NO_WORK))

    def kill(self) -> int:
        """SIGKILL all its processes, as a machine that goes without a word; return how many there were."""
        processes = self.processes()
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(processes)


class Watch(threading.Thread):
    """Counts the nodes of a cluster twice a second.

    Attributes:
        samples: Seconds since the beginning, and the number of nodes of each group then.
        requests: Seconds, and for how many bundles `request_resources` holds nodes from then on.
    """

    def __init__(self, port: str, groups: set[str]) -> None:
        super().__init__(daemon=True)
        self._address = f"127.0.0.1:{port}"
        self._groups = sorted(groups)
        self._began = time.monotonic()
        self.samples: list[tuple[float, dict[str, int]]] = []
        self.requests: list[tuple[float, int]] = [(0.0, 0)]
        self._is_over = threading.Event()

    @property
    def now_s(self) -> float:
        return round(time.monotonic() - self._began, 2)

    def run(self) -> None:
        while not self._is_over.wait(_EVERY_S):
            nodes = Counter(node.group for node in self.nodes())
            self.samples.append((self.now_s, {group: nodes[group] for group in self._groups}))
            if (number := self.demands()["request_resources"]) != self.requests[-1][1]:
                self.requests.append((self.now_s, number))

    def end(self) -> None:
        self._is_over.set()
        self.join()

    def nodes(self) -> list[Node]:
        """All nodes but the head."""
        status = get_cluster_status(self._address)
        found = [*status.active_nodes, *status.idle_nodes]
        return [
            Node(node.ray_node_type_name, node.node_id) for node in found if node.ray_node_type_name in self._groups
        ]

    def demands(self) -> dict[str, int]:
        """What the autoscaler is asked for: tasks and actors, placement groups, bundles by `request_resources`."""
        asked = get_cluster_status(self._address).resource_demands
        bundles = [shape.count for demand in asked.cluster_constraint_demand for shape in demand.bundles_by_count]
        return {
            "tasks_and_actors": len(asked.ray_task_actor_demand),
            "placement_groups": len(asked.placement_group_demand),
            "request_resources": sum(bundles),
        }

    def wait_for_none(self, limit_s: float) -> float:
        """Wait until all nodes are gone; return how long it took."""
        began = time.monotonic()
        while nodes := self.nodes():
            assert time.monotonic() - began < limit_s, f"nodes stay: {[(node, node.work()) for node in nodes]}"
            time.sleep(_EVERY_S)
        return round(time.monotonic() - began, 2)

    def held(self, api: str) -> dict[str, Any]:
        """What jobs that are over have left: actors, placement groups, demands; and Ray's own actors, by name.

        Ray's own are there once for all trainings, detached and without a CPU; on the head they hold no node.
        """
        actors = state.list_actors(address=api, filters=[("state", "!=", "DEAD")], detail=True, limit=1000)
        heads = {node.node_id for node in state.list_nodes(address=api) if node.is_head_node}
        own = [
            actor
            for actor in actors
            if actor.name in _RAYS_OWN
            and actor.is_detached
            and actor.node_id in heads
            and not {"CPU", "GPU"} & set(actor.required_resources or {})
        ]
        groups = state.list_placement_groups(address=api, filters=[("state", "!=", "REMOVED")], limit=1000)
        return {
            "actors": sorted(actor.class_name for actor in actors if actor not in own),
            "placement_groups": len(groups),
            **{f"demand: {name}": number for name, number in self.demands().items()},
            "of Ray itself": sorted(actor.class_name for actor in own),
        }

    def lost_on(self, node: Node, api: str) -> dict[str, int]:
        """Count by name the tasks that failed and the actors that died because a node was lost."""
        on_it = [("node_id", "=", node.identity)]
        tasks = state.list_tasks(address=api, filters=[*on_it, ("state", "=", "FAILED")], detail=True, limit=10000)
        actors = state.list_actors(address=api, filters=[*on_it, ("state", "=", "DEAD")], detail=True, limit=1000)
        names = [task.name for task in tasks if task.type == "NORMAL_TASK"]
        names += [actor.class_name for actor in actors if "node" in str(actor.death_cause).lower()]
        return dict(Counter(names))

    def finished_on(self, name: str, api: str) -> list[str]:
        """Ids of the nodes on which tasks of this name were finished."""
        filters = [("name", "=", name), ("state", "=", "FINISHED")]
        return [task.node_id for task in state.list_tasks(address=api, filters=filters, detail=True, limit=10000)]
