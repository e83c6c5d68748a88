"""`infra/compose`: one machine's services."""

from __future__ import annotations

import copy
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

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


def test_every_image_has_a_version_and_no_port_is_open_to_the_network():
    for service in _read()["services"].values():
        tag = re.sub(r"\$\{\w+:-(.*)\}", r"\1", service["image"]).rpartition(":")[2]
        assert re.search(r"\d+\.\d+|\d{4}-\d\d", tag)
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


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
