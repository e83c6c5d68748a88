"""`infra/docker` and all shell scripts, by hadolint and shellcheck."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.infra import validators

ROOT = validators.INFRA.parent
DOCKERFILES = sorted(validators.INFRA.rglob("*Dockerfile"))
SCRIPTS = sorted([*validators.INFRA.rglob("*.sh"), ROOT / ".ci" / "run", ROOT / "infra/docker/cvft-mlflow-alive"])


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCKERFILES, ids=_name)
def test_hadolint_has_nothing_to_say(path):
    assert validators.dockerfile_problems(path) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("FROM python:3.11.14-slim-bookworm AS build", "FROM python AS build"),
        ("WORKDIR /src", "WORKDIR src"),
        ("COPY cvft cvft", "COPPY cvft cvft"),
        ("--no-install-recommends", ""),
        ("USER 1000:1000", "USER root"),
    ],
)
def test_a_broken_dockerfile_is_caught(tmp_path, old, new):
    text = (validators.INFRA / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert old in text
    broken = tmp_path / "Dockerfile"
    broken.write_text(text.replace(old, new))
    assert validators.dockerfile_problems(broken)


@pytest.mark.parametrize("path", DOCKERFILES, ids=_name)
def test_an_image_is_built_in_two_stages_from_a_pinned_python_and_is_not_root(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert bases == ["python:3.11.14-slim-bookworm"] * 2
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000:1000"]
    ignored = path.with_name(path.name + ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored  # nothing but what is named
    copied = {
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    }
    for source in copied - {"--chmod=0755"}:
        assert f"!{source}" in ignored
        assert (ROOT / source).exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=_name)
def test_shellcheck_has_nothing_to_say(path):
    assert validators.shell_problems(path) == []


def test_a_broken_script_is_caught(tmp_path):
    script = tmp_path / "broken.sh"
    script.write_text("#!/bin/bash\nfor file in $(ls *.yaml); do rm $file; done\nif [ -e a ]; then\n  true\n")
    assert validators.shell_problems(script)
