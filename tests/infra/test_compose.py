"""`infra/compose`: one machine's services."""

from __future__ import annotations

import copy
import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.server.security_utils import is_allowed_host_header

from tests.infra import validators

FOLDER = validators.INFRA / "compose"
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN")


def _read() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """The variables that `make-env.sh` makes."""
    script = shutil.copy(FOLDER / "make-env.sh", tmp_path_factory.mktemp("compose"))
    subprocess.run([script], check=True, capture_output=True)
    lines = Path(script).with_name(".env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_docker_compose_takes_the_composition(environment):
    assert validators.compose_problems(_read(), environment) == []


def test_docker_compose_says_what_to_do_where_passwords_are_missing(environment):
    environment = {name: value for name, value in environment.items() if name != "POSTGRES_PASSWORD"}
    problems = validators.compose_problems(_read(), environment)
    assert any("POSTGRES_PASSWORD" in line and "make-env.sh" in line for line in problems)


@pytest.mark.parametrize(
    ("service", "field", "value"),
    [
        ("postgres", "imag", "postgres"),
        ("postgres", "healthcheck", {"tests": ["CMD", "true"]}),
        ("mlflow", "depends_on", {"postgress": {"condition": "service_healthy"}}),
        ("mlflow", "depends_on", {"postgres": {"condition": 3}}),
        ("ray-head", "read_only", 3),
        ("ray-head", "volumes", ["cash:/cache"]),
        ("ray-worker", "deploy", {"replica": 2}),
    ],
)
def test_a_broken_field_is_caught(environment, service, field, value):
    composition = copy.deepcopy(_read())
    composition["services"][service][field] = value
    assert validators.compose_problems(composition, environment)


def test_no_secret_has_a_value_or_a_default():
    for name, service in _read()["services"].items():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable) or "PASSWORD" in value:
                assert re.search(r"\$\{\w+:\?", value), f"{name}: {variable}"


def test_every_image_has_a_version():
    for service in _read()["services"].values():
        tag = re.sub(r"\$\{\w+:-(.*)\}", r"\1", service["image"]).rpartition(":")[2]
        assert re.search(r"\d+\.\d+|\d{4}-\d\d", tag)


def _rendered(environment: dict[str, str]) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("docker-compose")), "--file", str(FOLDER / "compose.yaml")]
    command += ["--profile", "*", "config", "--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["services"]


def test_no_port_is_open_to_the_network_unless_its_address_is_named(environment):
    closed, open_ = (_rendered(environment | more) for more in ({}, {"MLFLOW_ADDRESS": "10.0.0.5"}))
    assert {port["host_ip"] for service in closed.values() for port in service.get("ports", [])} == {"127.0.0.1"}
    assert {
        name for name, service in open_.items() if {"10.0.0.5"} & {port["host_ip"] for port in service.get("ports", [])}
    } == {"mlflow"}


@pytest.mark.parametrize(
    ("more", "taken", "refused"),
    [
        ({}, ["mlflow:5000", "127.0.0.1:5000", "localhost:5000"], ["10.0.0.5:5000", "", "evil.example:5000"]),
        ({"MLFLOW_HOST": "10.0.0.5"}, ["mlflow:5000", "10.0.0.5:5000"], ["10.0.0.6:5000", "evil.example:5000"]),
    ],
)
def test_mlflow_answers_by_the_names_that_it_is_called_by(environment, more, taken, refused):
    mlflow = _rendered(environment | more)["mlflow"]
    hosts = mlflow["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert all(is_allowed_host_header(hosts, host) for host in taken)
    assert not any(is_allowed_host_header(hosts, host) for host in refused)


def test_what_ray_keeps_in_memory_has_room_there_and_homes_can_be_written(environment):
    services = _rendered(environment)
    for name in ("ray-head", "ray-worker"):
        (size,) = [
            word.split("=")[1] for word in services[name]["command"] if word.startswith("--object-store-memory=")
        ]
        assert int(size) <= int(services[name]["shm_size"])
    for name, dockerfile in {
        "ray-head": "Dockerfile",
        "ray-worker": "Dockerfile",
        "mlflow": "mlflow.Dockerfile",
    }.items():
        assert validators.home_of(dockerfile) in [mount.split(":")[0] for mount in services[name]["tmpfs"]]


def test_postgres_is_ready_when_it_answers_over_the_network(environment):
    # While it sets itself up it answers on its socket alone, and then ends that server.
    assert "--host" in _rendered(environment)["postgres"]["healthcheck"]["test"]


def test_docker_compose_can_lock_images_by_digest_as_the_readme_says():
    assert "config --lock-image-digests" in (FOLDER / "README.md").read_text(encoding="utf-8")
    program = str(Path(sys.executable).with_name("docker-compose"))
    told = subprocess.run([program, "config", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--lock-image-digests" in told


def test_no_service_keeps_root_s_powers():
    for service in _read()["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_environment_has_a_password_by_chance_for_each_that_is_asked_for(tmp_path):
    script = shutil.copy(FOLDER / "make-env.sh", tmp_path)
    subprocess.run([script], check=True, capture_output=True)
    lines = (tmp_path / ".env").read_text(encoding="utf-8").splitlines()
    made = dict(line.split("=", 1) for line in lines)
    asked = set(re.findall(r"\$\{(\w+):\?", (FOLDER / "compose.yaml").read_text(encoding="utf-8")))
    assert set(made) == asked
    secrets = [value for name, value in made.items() if SECRET.search(name)]
    assert len(set(secrets)) == len(secrets)
    assert min(map(len, secrets)) >= 48
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    again = subprocess.run([script], check=False, capture_output=True, text=True)
    assert again.returncode == 1
    assert "is there already" in again.stderr
