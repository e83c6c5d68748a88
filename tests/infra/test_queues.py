"""`infra/kuberay/queues`: what the jobs of `queued/` name is declared, and each of them fits its quota."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.infra import validators
from tests.infra.kubernetes_files import BUILDS, KUBERAY, QUEUES, build, short_name

QUEUED = [path for path in BUILDS if path.parts[-2] == "queued"]
UNITS = {"m": 0.001, "Mi": 2**20, "Gi": 2**30}


def _declared(kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in validators.documents(QUEUES) if manifest["kind"] == kind]
    return found


def _number(quantity: str) -> float:
    for unit, factor in UNITS.items():
        if quantity.endswith(unit):
            return float(quantity.removesuffix(unit)) * factor
    return float(quantity)


def _requests(pod: dict[str, Any]) -> Counter[str]:
    asked: Counter[str] = Counter()
    for container in pod["spec"]["containers"]:
        for name, quantity in container["resources"]["requests"].items():
            asked[name] += _number(quantity)  # type: ignore[assignment]  # Counter's type knows whole numbers only
    return asked


def _asked(job: dict[str, Any]) -> Counter[str]:
    """All that Kueue counts: the head, the workers, and the pod that submits."""
    spec = job["spec"]
    asked = _requests(spec["rayClusterSpec"]["headGroupSpec"]["template"]) + _requests(spec["submitterPodTemplate"])
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        for _ in range(group["replicas"]):
            asked += _requests(group["template"])
    return asked


def _quota() -> dict[str, float]:
    (group,) = _declared("ClusterQueue")["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert [quota["name"] for quota in flavor["resources"]] == group["coveredResources"]
    return {quota["name"]: _number(quota["nominalQuota"]) for quota in flavor["resources"]}


@pytest.mark.parametrize("folder", QUEUED, ids=short_name)
def test_a_queued_job_names_what_is_declared_and_fits_the_quota(folder):
    (job,) = build(folder)
    labels = job["metadata"]["labels"]
    queue = _declared("LocalQueue")["metadata"]
    assert (labels["kueue.x-k8s.io/queue-name"], job["metadata"]["namespace"]) == (queue["name"], queue["namespace"])
    assert labels["kueue.x-k8s.io/priority-class"] == _declared("WorkloadPriorityClass")["metadata"]["name"]
    quota = _quota()
    assert {name: amount for name, amount in _asked(job).items() if amount > quota.get(name, 0.0)} == {}


def test_the_quota_holds_a_search_and_a_sharding_at_once():
    asked: Counter[str] = Counter()
    for name in ("tune", "shard"):
        (job,) = build(KUBERAY / "queued" / name)
        asked += _asked(job)
    assert {name: amount for name, amount in asked.items() if amount > _quota().get(name, 0.0)} == {}


def test_the_queue_leads_to_the_quota_and_the_quota_to_its_nodes():
    quota = _declared("ClusterQueue")
    assert _declared("LocalQueue")["spec"]["clusterQueue"] == quota["metadata"]["name"]
    (group,) = quota["spec"]["resourceGroups"]
    assert [flavor["name"] for flavor in group["flavors"]] == [_declared("ResourceFlavor")["metadata"]["name"]]
    selector = quota["spec"]["namespaceSelector"]["matchLabels"]
    assert selector == {"kubernetes.io/metadata.name": _declared("LocalQueue")["metadata"]["namespace"]}
