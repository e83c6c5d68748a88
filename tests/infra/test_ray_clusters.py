"""`infra/ray`: the cluster launcher's files, the account's template."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

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
