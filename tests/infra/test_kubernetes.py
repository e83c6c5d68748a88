"""`infra/kuberay`: what the API server and KubeRay's operator would say, offline."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.infra import entrypoints, validators
from tests.infra.kubernetes_files import BUILDS, FILES, KUBERAY, build, ray_cluster, short_name

SHARED = Path(__file__).parents[3] / "shared" / "schemas" / "kuberay"


@pytest.mark.parametrize("path", FILES, ids=short_name)
def test_each_object_fits_the_schema_of_its_kind(path):
    for manifest in validators.documents(path):
        assert validators.kubernetes_problems(manifest) == []


@pytest.mark.parametrize("folder", BUILDS, ids=short_name)
def test_what_kustomize_makes_fits_as_well_and_the_operator_takes_it(folder):
    for manifest in build(folder):
        assert validators.kubernetes_problems(manifest) == []
        if manifest["apiVersion"].startswith("ray.io/"):
            assert validators.operator_problems(manifest) == []


BROKEN = [
    ("spec.rayVersion", 2.6),
    ("spec.enableInTreeAutoscalling", True),
    ("spec.autoscalerOptions.version", "v3"),
    ("spec.autoscalerOptions.idleTimeoutSeconds", "2m"),
    ("spec.authOptions.mode", "tokens"),
    ("spec.gcsFaultToleranceOptions.redisPassword", "secret"),
    ("spec.workerGroupSpecs.0.minReplica", 0),
    ("spec.workerGroupSpecs.1.template.spec.terminationGracePeriod", 60),
    ("spec.workerGroupSpecs.1.template.spec.containers.0.securityContext.runAsNonRot", True),
    ("spec.headGroupSpec.rayStartParams.num-cpus", 0),
    ("apiVersion", "ray.io/v1alpha1"),
    ("kind", "RayClusters"),
]


@pytest.mark.parametrize(("field", "value"), BROKEN, ids=lambda value: str(value))
def test_a_broken_field_of_a_ray_cluster_is_caught(field, value):
    cluster = ray_cluster()
    *parents, leaf = field.split(".")
    node: Any = cluster
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node[parent]
    node[leaf] = value
    assert validators.kubernetes_problems(cluster)


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet", "NetworkPolicy", "PodDisruptionBudget", "PriorityClass"])
def test_a_broken_field_of_each_kind_of_kubernetes_itself_is_caught(kind):
    manifests = [manifest for path in FILES for manifest in validators.documents(path) if manifest["kind"] == kind]
    for manifest in manifests:
        broken = copy.deepcopy(manifest)
        broken.get("spec", broken)["polycyTypes"] = ["Ingress"]
        assert validators.kubernetes_problems(broken)
    assert manifests


def test_a_broken_field_of_a_ray_job_and_a_cron_job_is_caught():
    (job,) = validators.documents(KUBERAY / "jobs" / "train" / "rayjob.yaml")
    (cron,) = validators.documents(KUBERAY / "jobs" / "evaluate-nightly" / "raycronjob.yaml")
    job["spec"]["backofLimit"] = 1
    del cron["spec"]["schedule"]
    assert validators.kubernetes_problems(job)
    assert validators.kubernetes_problems(cron)


DELETE = {"policy": "DeleteCluster"}
RULE = {**DELETE, "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}}
LEGACY = {"onSuccess": DELETE, "onFailure": DELETE}


@pytest.mark.parametrize(
    ("field", "value", "refused_at"),
    [
        ("managedBy", "ray.io/kuberay-operator", None),
        ("managedBy", "kueue", "$.spec.managedBy"),
        ("deletionStrategy", LEGACY, None),
        ("deletionStrategy", {"deletionRules": [RULE]}, None),
        ("deletionStrategy", {"onSuccess": DELETE}, "$.spec.deletionStrategy"),
        ("deletionStrategy", {**LEGACY, "deletionRules": [RULE]}, "$.spec.deletionStrategy"),
        (
            "deletionStrategy",
            {"deletionRules": [RULE, {**DELETE, "condition": {"ttlSeconds": 60}}]},
            "$.spec.deletionStrategy.deletionRules[1].condition",
        ),
    ],
)
def test_what_only_a_rule_beside_the_schema_refuses_is_caught(field, value, refused_at):
    (job,) = validators.documents(KUBERAY / "jobs" / "train" / "rayjob.yaml")
    job["spec"][field] = value
    problems = validators.kubernetes_problems(job)
    assert [line.partition(":")[0] for line in problems] == [refused_at] * bool(refused_at)


def test_what_only_the_operator_refuses_is_caught():
    cluster = ray_cluster()
    job = {"kind": "RayJob", "metadata": {"name": "job"}, "spec": {"rayClusterSpec": cluster["spec"]}}
    assert validators.operator_problems(job) == []
    job["spec"] |= {"deletionStrategy": {"deletionRules": [{}]}, "shutdownAfterJobFinishes": True}
    assert validators.operator_problems(job)
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["restartPolicy"] = "Always"
    assert validators.operator_problems(cluster)


def test_groups_begin_at_no_worker_and_the_head_takes_no_task():
    spec = ray_cluster()["spec"]
    assert [(group["groupName"], group["minReplicas"], group["replicas"]) for group in spec["workerGroupSpecs"]] == [
        ("cpu", 0, 0),
        ("gpu", 0, 0),
    ]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["rayVersion"] == ray.__version__
    for group in spec["workerGroupSpecs"]:  # Ray drains for 30 s
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("path", FILES, ids=short_name)
def test_no_container_is_root_or_may_become_it_or_write_outside_its_volumes(path):
    for manifest in validators.documents(path):
        for pod in validators.mappings(manifest):
            if "containers" not in pod:
                continue
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] > 0
            assert pod["serviceAccountName"].startswith("cvft-")
            for container in pod["containers"]:
                context = container["securityContext"]
                assert context["readOnlyRootFilesystem"] is True
                assert context["allowPrivilegeEscalation"] is False
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert "memory" in container["resources"]["limits"]
                assert "cpu" in container["resources"]["requests"]


@pytest.mark.parametrize("path", FILES, ids=short_name)
def test_passwords_and_keys_come_from_secrets_alone(path):
    for manifest in validators.documents(path):
        for variable in validators.mappings(manifest):
            if any(word in str(variable.get("name")).upper() for word in ("PASSWORD", "SECRET", "TOKEN", "STORE_URI")):
                assert "value" not in variable
        assert manifest["kind"] != "Secret"


@pytest.mark.parametrize("path", sorted(KUBERAY.glob("jobs/*/ray*.yaml")), ids=short_name)
def test_each_entrypoint_is_a_command_line_that_the_job_takes(path):
    (manifest,) = validators.documents(path)
    spec = manifest["spec"].get("jobTemplate", manifest["spec"])
    assert entrypoints.problems(spec["entrypoint"]) == []


@pytest.mark.parametrize(
    "command",
    [
        "python -m jobs.shard --root s3://a",
        "python -m jobs.train --config modern train.gama=3",
        "python -m jobs.train --config modrn",
        "python -m jobs.tune --spec twon --manifest a --out b",
        "python -m jobs.tune --spec town --manifest a --out b train.num_epoch=3",
        "python -m jobs.evaluat --checkpoint a --manifest b",
        "cvft train",
    ],
)
def test_a_broken_command_line_is_caught(command):
    assert entrypoints.problems(command)


@pytest.mark.parametrize("folder", [path for path in BUILDS if path.parts[-2] == "queued"], ids=short_name)
def test_a_queued_job_names_its_queue_and_has_a_size(folder):
    (job,) = build(folder)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "cvft"
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    assert sum(group["replicas"] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]) > 0


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_an_overlay_leaves_no_image_unnamed(overlay):
    images = {node["image"] for node in validators.mappings(build(KUBERAY / "overlays" / overlay)) if "image" in node}
    assert images
    for image in images:
        repository, _, tag = image.rpartition(":")
        assert repository
        assert tag not in ("", "latest")


def test_all_that_is_named_is_there():
    made = build(KUBERAY / "overlays" / "prod")
    names = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in made}
    for node in validators.mappings(made):
        if "serviceAccountName" in node:
            assert ("ServiceAccount", node["serviceAccountName"]) in names
        if "priorityClassName" in node:
            assert ("PriorityClass", node["priorityClassName"]) in names
        if "configMapRef" in node:
            assert ("ConfigMap", node["configMapRef"]["name"]) in names
    assert {"redis", "postgres", "mlflow"} <= {name for kind, name in names if kind == "Service"}


def test_the_schemas_are_the_ones_that_were_shared():
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there to compare the vendored schemas with")
    ours = json.loads(gzip.decompress((validators.SCHEMAS / "kuberay-1.7.json.gz").read_bytes()))
    definition = yaml.load((SHARED / "ray.io_rayclusters.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    (theirs,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    assert ours["RayCluster"] == theirs["schema"]["openAPIV3Schema"]
