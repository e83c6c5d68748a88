"""`infra/ray`: the cluster launcher's files, the account's template."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from tests.infra import validators

FOLDER = validators.INFRA / "ray"
CLUSTERS = ["aws.yaml", "gcp.yaml"]


def _read(name: str) -> dict[str, Any]:
    (config,) = validators.documents(FOLDER / name)
    return config


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_fits_the_schema_in_rays_wheel(name):
    assert validators.ray_cluster_problems(_read(name)) == []


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_launcher_itself_fills_in_the_rest_and_takes_it(name):
    config = prepare_config(_read(name))
    validate_config(config)
    assert config["setup_commands"] == []  # the image holds everything
    assert "ray start" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_worker", 3),
        ("idle_timeout_minutes", "5m"),
        ("head_node_type", "heads"),
        ("docker.images", "cvft"),
        ("available_node_types.cpu-spot.min_workers", "0"),
        ("available_node_types.cpu-spot.resources", {"CPU": 1.5}),
        ("available_node_types.cpu-spot.spot", True),
        ("worker_nodes", {}),
    ],
)
def test_a_broken_field_is_caught(name, field, value):
    config = _read(name)
    *parents, leaf = field.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    assert validators.ray_cluster_problems(config)


@pytest.mark.parametrize(
    "change",
    [
        {"InstanceTyp": "m5.large"},
        {"InstanceMarketOptions": {"MarketTyp": "spot"}},
        {"BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": "large"}}]},
        {"IamInstanceProfile": {"Arn": 5}},
    ],
    ids=str,
)
def test_a_broken_parameter_of_ec2_is_caught(change):
    config = copy.deepcopy(_read("aws.yaml"))
    config["available_node_types"]["g5-spot"]["node_config"] |= change
    assert validators.ray_cluster_problems(config)


@pytest.mark.parametrize("name", CLUSTERS)
def test_only_the_head_is_on_demand_and_nothing_is_kept_while_idle(name):
    config = _read(name)
    for node_type, node in config["available_node_types"].items():
        settings = str(node["node_config"])
        assert ("'MarketType': 'spot'" in settings or "'SPOT'" in settings) == (node_type != config["head_node_type"])
        if node_type != config["head_node_type"]:
            assert node["min_workers"] == 0
            assert node["max_workers"] > 0
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_container_on_a_gpu_node_is_the_gpu_image_and_sees_gpus(name):
    config = prepare_config(_read(name))
    config["file_mounts"] = {}  # a token file, which need not be here
    read = AutoscalingConfig(config, skip_content_hash=True)
    for node_type, node in config["available_node_types"].items():
        docker = read.get_docker_config(node_type)
        options = " ".join([*docker["run_options"], *docker.get("worker_run_options", [])])
        has_gpu = "GPU" in node["resources"]
        # NVIDIA's runtime, which Ray asks for where it finds it, shows none unless this is set.
        assert ("NVIDIA_VISIBLE_DEVICES=all" in options) == has_gpu
        assert (docker.get("worker_image", docker["image"]) == "${CVFT_GPU_IMAGE}") == has_gpu


def test_on_gcp_the_heads_account_is_rays_which_may_start_nodes_and_the_workers_is_ours():
    for name, node in _read("gcp.yaml")["available_node_types"].items():
        assert ("serviceAccounts" in node["node_config"]) == (name != "head")


@pytest.mark.parametrize(
    ("images", "logins"),
    [
        (("1.dkr.ecr.eu-central-1.amazonaws.com/cvft:1-cpu", "docker.io/me/cvft:1-gpu"), 1),
        (("registry.example.com/cvft:0.1.0-cpu", "registry.example.com/cvft:0.1.0-gpu"), 0),
    ],
)
def test_a_node_logs_in_to_ecr_where_an_image_lies_there(tmp_path, images, logins):
    (command,) = [line for line in _read("aws.yaml")["initialization_commands"] if "ecr" in line]
    filled = {"${CVFT_CPU_IMAGE}": images[0], "${CVFT_GPU_IMAGE}": images[1], "${AWS_REGION}": "eu-central-1"}
    for name, value in filled.items():
        command = command.replace(name, value)
    for program, body in {"aws": "echo password-of $*", "docker": 'echo "$* with $(cat)" >>"$0.log"'}.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / program).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], env=environment, check=True)
    log = tmp_path / "docker.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    assert len(lines) == logins
    for line in lines:
        assert line.startswith(
            "login --username AWS --password-stdin 1.dkr.ecr.eu-central-1.amazonaws.com with password-of"
        )


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_readme_tells_all_variables_and_no_other(name):
    used = set(re.findall(r"\$\{([A-Z_]+)\}", (FOLDER / name).read_text(encoding="utf-8")))
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    (filled,) = [text for text, file in re.findall(r"envsubst '([^']*)' \\\s+<infra/ray/(\S+)", readme) if file == name]
    assert set(re.findall(r"\$([A-Z_]+)", filled)) == used
    for variable in used:
        assert re.search(rf"(export|\s){variable}=", readme)


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_token_comes_from_a_file_and_nothing_secret_is_in_here(name):
    config = _read(name)
    options = " ".join(config["docker"]["run_options"])
    assert "RAY_AUTH_MODE=token" in options
    path = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)", options)[1]
    assert path in config["file_mounts"]
    assert not re.search(r"(SECRET|PASSWORD|ACCESS_KEY)", (FOLDER / name).read_text(encoding="utf-8"))


def test_the_accounts_template_is_clean_and_a_broken_one_is_not(tmp_path):
    template = FOLDER / "aws-account.yaml"
    assert validators.cloudformation_problems(template) == []
    broken = tmp_path / "broken.yaml"
    broken.write_text(template.read_text(encoding="utf-8").replace("BucketEncryption:", "BucketEncription:"))
    assert validators.cloudformation_problems(broken)
