"""The commands that the READMEs of `infra/` tell are ones that the jobs take."""

from __future__ import annotations

import re

import pytest

from tests.infra import entrypoints, validators

COMMANDS = sorted(
    (str(readme.relative_to(validators.INFRA)), command)
    for readme in validators.INFRA.rglob("README.md")
    for command in re.findall(r"python -m jobs\.[a-z_]+ [^\n`|)]+", readme.read_text(encoding="utf-8"))
)


def test_there_are_commands():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize(("readme", "command"), COMMANDS)
def test_a_command_is_one_that_the_job_takes(readme, command):
    assert entrypoints.problems(command) == [], readme
