"""Room on a cluster for what a job needs: asked for, waited for in words, refused at once where it never comes.

A placement group asks for it, which the autoscaler sees as it sees the work itself; it is given back as soon as it is
there, and the work takes its place before idle nodes are taken away. So nothing of ours holds a node.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cvft.errors import ClusterError
from jobs.entry import LINE_INTERVAL_S, LOGGER

_POLL_S = 1.0
_GRACE_S = 3.0  # nodes that have just gone are still counted, and those that have just come are not
_NEWS_S = 12.0  # the autoscaler looks each 5 s: what others gave back is known to it after two looks at the latest


def await_room(
    number: int, resources: Mapping[str, float], *, what: str, labels: Mapping[str, str] | None = None
) -> None:
    """Wait until the cluster has room for `number` times `resources`, and say what is waited for.

    Args:
        number: Workers or tasks that must run at the same time.
        resources: What each needs.
        what: The key or option that asks for them, for messages.
        labels: Labels of the nodes to run on.

    Raises:
        ClusterError: There is no such room, now or later: no node is large enough and none that is can be added.
    """
    wanted = _Wanted(number, dict(resources), dict(labels or {}), what)
    group = placement_group([wanted.resources] * number, bundle_label_selector=[wanted.labels] * number)
    began = last_said = time.monotonic()
    is_sure_at = began + _GRACE_S
    try:
        while not group.wait(_POLL_S):
            now = time.monotonic()
            status = _Status.now()
            if _others_hold(wanted, status):
                is_sure_at = now + _NEWS_S
            elif now >= is_sure_at:
                _check_possible(wanted, group, status)
            if now - last_said >= LINE_INTERVAL_S or last_said == began:
                last_said = now
                LOGGER.info("waiting for %s (%s): %s", wanted, what, status.describe(wanted.labels))
        if last_said != began:
            LOGGER.info("%s found after %.0f s", wanted, time.monotonic() - began)
    finally:
        remove_placement_group(group)


def can_add_nodes() -> bool:
    """Tell whether the cluster that this process is connected to has an autoscaler."""
    return _Status.now().has_autoscaler


def has_room(resources: Mapping[str, float], labels: Mapping[str, str]) -> bool:
    """Tell whether one node with these labels has so much that nobody uses."""
    status = _Status.now()
    return any(_num_in(resources, status.free_of(node)) for node in _labelled(status.nodes, labels))


def describe_room(labels: Mapping[str, str]) -> str:
    """Say in one line what the cluster has, what of it is free, and whether more comes."""
    return _Status.now().describe(labels)


@dataclass(frozen=True)
class _Wanted:
    number: int
    resources: dict[str, float]
    labels: dict[str, str]
    what: str

    def __str__(self) -> str:
        return f"{self.number} x {_sum(self.resources)}{_on(self.labels)}"


@dataclass(frozen=True)
class _Status:
    """What the cluster is, and what its autoscaler does.

    Attributes:
        nodes: Those that are alive, as `ray.nodes()` gives them.
        free: Resources that nobody uses, by the node's id.
        has_autoscaler: Whether nodes can come.
        infeasible: Ids of placement groups that no nodes can hold, whatever is added.
        coming: Nodes that are being started, by type.
    """

    nodes: list[dict[str, Any]]
    free: Mapping[str, Mapping[str, float]]
    has_autoscaler: bool
    infeasible: frozenset[str]
    coming: Mapping[str, int]

    @classmethod
    def now(cls) -> _Status:
        reply = GetClusterStatusReply()
        reply.ParseFromString(GcsClient(address=ray.get_runtime_context().gcs_address).get_cluster_status())
        state = reply.autoscaling_state
        nodes = [node for node in ray.nodes() if node["Alive"]]
        coming: dict[str, int] = {}
        for request in state.pending_instance_requests:
            coming[request.ray_node_type_name] = coming.get(request.ray_node_type_name, 0) + request.count
        return cls(
            nodes=nodes,
            free={
                node.node_id.hex(): dict(node.available_resources) for node in reply.cluster_resource_state.node_states
            },
            has_autoscaler=state.autoscaler_state_version > 0 or _has_old_autoscaler(),
            # A gang is described as id, strategy and state.
            infeasible=frozenset(gang.details.split(":")[0] for gang in state.infeasible_gang_resource_requests),
            coming=coming,
        )

    def free_of(self, node: Mapping[str, Any]) -> Mapping[str, float]:
        """Return what nobody uses of a node; nothing of one that has just come."""
        return self.free.get(node["NodeID"], {})

    def describe(self, labels: Mapping[str, str]) -> str:
        """Say what there is."""
        totals = _total(node["Resources"] for node in self.nodes)
        shown = {name: amount for name, amount in totals.items() if name in ("CPU", "GPU")}
        unused = _total(self.free_of(node) for node in self.nodes)
        free = {name: unused.get(name, 0.0) for name in shown}
        said = f"{_sum(free)} free of {_sum(shown)}" if shown else "no CPU or GPU"
        said += f" on {len(self.nodes)} node{'' if len(self.nodes) == 1 else 's'}"
        if labels:
            said += f", {len(_labelled(self.nodes, labels))} of them{_on(labels)}"
        if self.coming:
            return said + "; coming: " + ", ".join(f"{number} x {name}" for name, number in self.coming.items())
        return said + ("; the autoscaler adds none so far" if self.has_autoscaler else "; there is no autoscaler")


def _check_possible(wanted: _Wanted, group: PlacementGroup, status: _Status) -> None:
    if group.id.hex() in status.infeasible:
        reason = "no type of node that its autoscaler may add holds them, or it may not add so many"
    elif not status.has_autoscaler and _num_held(wanted, status.nodes) < wanted.number:
        reason = "there is no autoscaler to add any"
    else:
        return
    found = status.describe(wanted.labels).partition(";")[0]
    less = "less, or for other labels" if wanted.labels else "less"
    raise ClusterError(
        f"{wanted.what}: {wanted} cannot be had: the cluster has {found}, and {reason}; "
        f"ask for {less}, or let the cluster have more"
    )


def _others_hold(wanted: _Wanted, status: _Status) -> bool:
    """Tell whether to wait for what others hold now.

    The autoscaler calls infeasible what does not fit into the nodes that it may add and what is *free* of those that
    are there: on a full cluster that is everything.
    """
    held = _num_held(wanted, status.nodes)
    num_free = sum(_num_in(wanted.resources, status.free_of(node)) for node in _labelled(status.nodes, wanted.labels))
    return status.has_autoscaler and (held >= wanted.number or num_free < held)


def _num_held(wanted: _Wanted, nodes: list[dict[str, Any]]) -> int:
    """Return how many of what is wanted fit into the nodes if nothing else is there."""
    return sum(_num_in(wanted.resources, node["Resources"]) for node in _labelled(nodes, wanted.labels))


def _num_in(wanted: Mapping[str, float], resources: Mapping[str, float]) -> int:
    return min(int(resources.get(name, 0.0) / amount) for name, amount in wanted.items())


def _labelled(nodes: list[dict[str, Any]], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    return [node for node in nodes if labels.items() <= node["Labels"].items()]


def _has_old_autoscaler() -> bool:
    """Tell whether Ray's first autoscaler adds nodes here; where it only looks on, it names types after nodes."""
    text = ray.experimental.internal_kv._internal_kv_get("__autoscaling_status")
    report = json.loads(text).get("autoscaler_report") if text else None
    types = list((report or {}).get("active_nodes") or {})
    ids = {f"node_{node['NodeID']}" for node in ray.nodes()}
    return bool(types) and not set(types) <= ids


def _total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for resources in parts:
        for name, amount in resources.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _sum(resources: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _on(labels: Mapping[str, str]) -> str:
    return "" if not labels else " on " + ", ".join(f"{key}={value}" for key, value in labels.items())
