"""`infra/kuberay` once it runs: what its pods may reach, where they may write, who is evicted, what is watched."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

import pytest
from mlflow.server.security_utils import is_allowed_host_header
from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION

from jobs.promote import CHAMPION
from jobs.search.config import load_search
from jobs.tracking_config import TrackingConfig
from pipeline.tracking.versions import split_model_uri
from tests.infra import validators
from tests.infra.kubernetes_files import BUILDS, FILES, KUBERAY, build, ray_cluster, short_name


def _named(kind: str) -> list[dict[str, Any]]:
    return [found for path in FILES for found in validators.documents(path) if found["kind"] == kind]


def _bytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) * 2**30


def test_a_budget_over_pods_of_ray_is_a_whole_number_and_workers_have_none():
    # KubeRay's clusters have no `scale` subresource, by which Kubernetes finds out what `maxUnavailable` is of, and a
    # budget that it cannot reckon lets no pod go at all.
    labels = {**ray_cluster()["spec"]["headGroupSpec"]["template"]["metadata"]["labels"], "ray.io/is-ray-node": "yes"}
    of_heads = []
    for budget in _named("PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"]
        assert not validators.selects(selector, {**labels, "ray.io/node-type": "worker"})
        if validators.selects(selector, {**labels, "ray.io/node-type": "head"}):
            of_heads.append(budget)
            assert set(budget["spec"]) == {"minAvailable", "selector"}
            assert isinstance(budget["spec"]["minAvailable"], int)
    assert of_heads


def test_prometheus_is_told_the_nodes_of_ray_and_not_the_pods_that_submit_jobs():
    (service,) = [found for found in _named("Service") if found["metadata"]["name"] == "ray-metrics"]
    selector = service["spec"]["selector"]
    spec = ray_cluster()["spec"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        labels = {**group["template"]["metadata"]["labels"], "ray.io/is-ray-node": "yes"}  # KubeRay's own
        assert validators.selects(selector, labels)
    for job in _named("RayJob"):
        assert not validators.selects(selector, job["spec"]["submitterPodTemplate"]["metadata"]["labels"])


@pytest.mark.parametrize("folder", BUILDS, ids=short_name)
def test_what_ray_keeps_in_memory_fits_its_volume(folder):
    # Else it goes to /tmp, on a disk.
    for made in build(folder):
        for spec in validators.mappings(made):
            for group in [spec.get("headGroupSpec"), *spec.get("workerGroupSpecs", [])]:
                if group is None:
                    continue
                pod = group["template"]["spec"]
                memory = _bytes(pod["containers"][0]["resources"]["limits"]["memory"])
                (shm,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
                assert shm["medium"] == "Memory"
                share = DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
                assert share * memory <= _bytes(shm["sizeLimit"]) <= memory


@pytest.mark.parametrize("path", FILES, ids=short_name)
def test_the_home_of_an_image_of_ours_can_be_written(path):
    homes = {"cvft-cpu": "Dockerfile", "cvft-gpu": "Dockerfile", "cvft-mlflow": "mlflow.Dockerfile"}
    for manifest in validators.documents(path):
        for container in validators.mappings(manifest):
            if container.get("image") in homes:
                mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
                assert validators.home_of(homes[container["image"]]) in mounts


def test_mlflow_answers_by_each_name_that_it_is_called_by_and_no_other():
    variables = {
        node["name"]: node.get("value") for node in validators.mappings(_named("Deployment")) if "name" in node
    }
    hosts = str(variables["MLFLOW_SERVER_ALLOWED_HOSTS"]).split(",")
    texts = [path.read_text(encoding="utf-8") for path in [*KUBERAY.rglob("*.yaml"), KUBERAY / "README.md"]]
    called = {name for text in texts for name in re.findall(r"http://(mlflow[a-z.]*:\d+)", text)}
    assert {"mlflow:5000", "mlflow.cvft:5000"} <= called
    for host in called | {"127.0.0.1:5000", "localhost:5000"}:  # a port-forward
        assert is_allowed_host_header(hosts, host)
    assert not is_allowed_host_header(hosts, "evil.example:5000")


def _may_reach(labels: dict[str, str], address: str, port: int) -> bool:
    """Whether NetworkPolicies let a pod speak to an address outside of the cluster."""
    for policy in _named("NetworkPolicy"):
        if not validators.selects(policy["spec"]["podSelector"].get("matchLabels", {}), labels):
            continue
        for rule in policy["spec"].get("egress", []):
            blocks = [peer["ipBlock"]["cidr"] for peer in rule.get("to", []) if "ipBlock" in peer]
            is_there = "to" not in rule or any(
                ipaddress.ip_address(address) in ipaddress.ip_network(block) for block in blocks
            )
            if is_there and ("ports" not in rule or port in [allowed["port"] for allowed in rule["ports"]]):
                return True
    return False


@pytest.mark.parametrize("component", ["ray", "service"])
def test_pods_reach_the_store_and_the_agent_that_gives_them_their_role_and_little_else(component):
    labels = {"app.kubernetes.io/part-of": "cvft", "app.kubernetes.io/component": component}
    assert _may_reach(labels, "52.95.170.1", 443)
    assert _may_reach(labels, "169.254.170.23", 80)  # of EKS Pod Identity
    assert not _may_reach(labels, "52.95.170.1", 80)
    assert not _may_reach(labels, "169.254.169.254", 80)  # the machine's own role is not theirs


def _specs_of_jobs() -> dict[str, dict[str, Any]]:
    crons = {found["metadata"]["name"]: found["spec"]["jobTemplate"] for found in _named("RayCronJob")}
    return crons | {found["metadata"]["name"]: found["spec"] for found in _named("RayJob")}


def test_an_evaluation_takes_a_gpu_for_itself_and_none_for_its_driver():
    for name, spec in _specs_of_jobs().items():
        assert not {"entrypointNumGpus", "entrypointNumCpus"} & set(spec)
        assert ("--use-gpu" in spec["entrypoint"]) == ("jobs.evaluate" in spec["entrypoint"]), name


def test_what_is_trained_is_registered_and_what_is_registered_is_evaluated():
    specs = _specs_of_jobs()
    model = re.search(r"tracking\.registered_model=(\S+)", specs["cvft-train"]["entrypoint"])[1]
    for name, alias in {"cvft-evaluate": TrackingConfig().alias, "cvft-evaluate-nightly": CHAMPION}.items():
        uri = re.search(r"--checkpoint (\S+)", specs[name]["entrypoint"])[1]
        assert split_model_uri(uri) == (model, None, alias)


def test_a_search_has_the_gpus_for_all_its_trials_at_a_time_by_itself_and_in_the_queue():
    entrypoint = _specs_of_jobs()["cvft-tune"]["entrypoint"]
    at_a_time = int(re.search(r"--max-concurrent (\d+)", entrypoint)[1])
    trial = load_search(re.search(r"--spec (\S+)", entrypoint)[1]).trial
    assert trial.gpus == 1
    group = ray_cluster()["spec"]["workerGroupSpecs"][1]
    assert (group["groupName"], group["maxReplicas"]) == ("gpu", at_a_time)
    assert trial.cpus <= int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    (queued,) = build(KUBERAY / "queued" / "tune")
    assert [made["replicas"] for made in queued["spec"]["rayClusterSpec"]["workerGroupSpecs"]] == [0, at_a_time]


def test_postgres_is_ready_when_it_answers_over_the_network():
    (probe,) = [node for node in validators.mappings(_named("StatefulSet")) if "pg_isready" in node.get("command", [])]
    assert "--host" in probe["command"]
