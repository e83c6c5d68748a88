"""What a job that has not begun waits for: room that other jobs hold, nodes that are coming, or what will never be.

Told by the dashboard beside the job server: its list of nodes, of actors, placement groups and tasks that run, and what
its autoscaler says.
"""

from __future__ import annotations

import ast
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.submission.attempt import Attempt
from jobs.submission.job_server import JobServer

_NEWS_S = 15.0
_NEVER = "No available node types can fulfill resource requests"
_SUPERVISOR = "_ray_internal_job_actor_"
_LOST = ("OWNER_DIED", "NODE_DIED")
_SETTLE_S = 3.0
_NUM_NAMED = 4
_MOST = 1000  # of a kind that are looked at


def asked_of(attempt: Attempt) -> str:
    """Say what a job asks for, for its own process; "" for nothing."""
    needs = " + ".join(f"{amount:g} {name}" for name, amount in attempt.needs.items())
    node = "a node with " + ", ".join(f"{key}={value}" for key, value in attempt.labels.items())
    return " on ".join([*([needs] if needs else []), *([node] if attempt.labels else [])])


def describe(server: JobServer, attempt: Attempt) -> str:
    """Say what a job that has not begun asks for, which jobs hold that, and which nodes are coming."""
    said = [asked_of(attempt) or "Ray to start it"]
    nodes = _nodes(server)
    for name in attempt.needs:
        total, held = sum(node["resources_total"].get(name, 0.0) for node in nodes), _holders(server, name)
        if held:
            who = [f"{job} {amount:g}" for job, amount in held.most_common(_NUM_NAMED)]
            who += [f"{len(held) - _NUM_NAMED} others"] if len(held) > _NUM_NAMED else []
            said.append(f"{held.total():g} of {total:g} {name} held by {', '.join(who)}")
    coming = [line for line in _section(server, "Pending") if line != "(no pending nodes)"]
    return "; ".join([*said, *(["nodes that come: " + ", ".join(coming)] if coming else [])])


def never_holds(server: JobServer, attempt: Attempt) -> bool:
    """Tell whether no node can hold a job that has not begun, now or later."""
    if attempt.status != "PENDING" or not (attempt.needs or attempt.labels):
        return False
    # The autoscaler calls infeasible what does not fit into what is *free*: on a full cluster that is everything.
    return not _fits(server, attempt) and (_is_fixed(server) or _is_infeasible(server, attempt))


def never_begins(server: JobServer, attempt: Attempt) -> bool:
    """Tell whether a job that has not begun was lost with the head that took it.

    The process which would have run it was that head's, and is dead for good; Ray lists the job as PENDING on until its
    start timeout is over.
    """
    if attempt.status != "PENDING" or not _has_lost_supervisor(server, attempt):
        return False
    # One that was deleted and submitted again under the same id is without its new process for a moment.
    time.sleep(_SETTLE_S)
    return _has_lost_supervisor(server, attempt) and server.get(attempt.id).status == "PENDING"


def _has_lost_supervisor(server: JobServer, attempt: Attempt) -> bool:
    causes = []
    for actor in _list(server, "actors", name=_SUPERVISOR + attempt.id):
        died = (actor["death_cause"] or {}).get("actor_died_error_context", {})
        causes.append(died.get("reason") if actor["state"] == "DEAD" else None)
    return bool(causes) and all(cause in _LOST for cause in causes)


def _is_infeasible(server: JobServer, attempt: Attempt) -> bool:
    """The autoscaler says so: no type of node that it may add is large enough."""
    for event in server.ask("/events").get("events", {}).get("global", []):
        said, is_new = event["message"], time.time() - float(event["timestamp"]) < _NEWS_S
        if event["sourceType"] != "AUTOSCALER" or not is_new or not said.startswith(_NEVER):
            continue
        if attempt.labels or "label selectors" not in said:
            resources = [ast.literal_eval(found) for found in re.findall(r"\{[^}]*\}(?=\*)", said)]
            if attempt.needs in resources:
                return True
    return False


def _is_fixed(server: JobServer) -> bool:
    """Nobody adds nodes: where Ray's autoscaler only looks on, it calls the type of each node after its number."""
    types = [line.split(maxsplit=1)[-1] for title in ("Active", "Idle") for line in _section(server, title)]
    known = [name for name in types if not name.startswith("(no ")]
    return bool(known) and all(re.fullmatch(r"node_[0-9a-f]{56}", name) for name in known)


def _fits(server: JobServer, attempt: Attempt) -> bool:
    """A node that is there would hold it, or one that was: those that are lost may be replaced."""
    nodes = _list(server, "nodes")
    return not nodes or any(
        all(node["resources_total"].get(name, 0.0) >= amount for name, amount in attempt.needs.items())
        and attempt.labels.items() <= node["labels"].items()
        for node in nodes
    )


def _section(server: JobServer, title: str) -> list[str]:
    """Return the lines below a title of the autoscaler's report for people."""
    report = str(server.ask("/api/cluster_status", format=1).get("clusterStatus") or "")
    found = re.search(rf"^{title}:\n((?: .*\n)*)", report, re.MULTILINE)
    return [line.strip() for line in found[1].splitlines()] if found else []


def _holders(server: JobServer, name: str) -> Counter[str]:
    """Return how much of a resource each job holds, by its id."""
    held: Counter[str] = Counter()
    for job, resources in _holdings(server):
        if resources.get(name, 0.0) > 0:
            held[job] += resources[name]  # type: ignore[assignment]  # Counter's type knows whole numbers only
    return held


def _holdings(server: JobServer) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Yield what is held: by placement groups, and by actors and tasks outside them."""
    jobs = {job.driver_job_id: job.id for job in server.all() if job.driver_job_id is not None}
    for group in _list(server, "placement_groups", state="CREATED"):
        for bundle in group["bundles"] or ():
            yield _name(jobs, group["creator_job_id"]), bundle["unit_resources"]
    for actor in _list(server, "actors", state="ALIVE"):
        is_own_process = (actor["name"] or "").startswith(_SUPERVISOR)
        who = actor["name"].removeprefix(_SUPERVISOR) if is_own_process else _name(jobs, actor["job_id"])
        if actor["placement_group_id"] is None:
            yield who, actor["required_resources"] or {}
    for task in _list(server, "tasks", state="RUNNING"):
        if task["placement_group_id"] is None and task["type"] == "NORMAL_TASK":
            yield _name(jobs, task["job_id"]), task["required_resources"] or {}


def _name(jobs: Mapping[str, str], driver_job_id: str) -> str:
    return jobs.get(driver_job_id, f"a driver outside the job server ({driver_job_id})")


def _nodes(server: JobServer) -> list[dict[str, Any]]:
    return _list(server, "nodes", state="ALIVE")


def _list(server: JobServer, kind: str, **equal: str) -> list[dict[str, Any]]:
    """List what there is of a kind, or of those the ones with a value in a column: `state="ALIVE"`."""
    only: dict[str, str] = {}
    for key, value in equal.items():
        only |= {"filter_keys": key, "filter_predicates": "=", "filter_values": value}
    found = server.ask(f"/api/v0/{kind}", detail=1, limit=_MOST, **only).get("result", {}).get("result", [])
    return list(found)
