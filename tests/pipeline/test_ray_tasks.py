"""Inputs are run in a bounded window; what failed for a passing reason is tried again, a lost worker too."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cvft.errors import ClusterError, DataError, StoreError
from pipeline.ray_tasks import MAX_RETRIES, OnRay
from pipeline.runner import Here

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def ticks() -> None:
    """Do nothing while waiting."""


def double(content: int) -> int:
    return 2 * content


def fail_at_first(content: tuple[str, str, int]) -> str:
    """Fail the first few times, as told by files that are left behind: by an error, or killed as if out of memory."""
    folder, how, num_failures = content
    num_calls = len(list(Path(folder).iterdir()))
    if num_calls < num_failures:
        (Path(folder) / str(num_calls)).touch()
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"store": StoreError("503"), "disk": OSError("reset"), "data": DataError("bad"), "bug": ValueError("x")}[
            how
        ]
    return how


@pytest.mark.parametrize("runner", [Here(), OnRay(), OnRay(window=1)])
def test_every_output_comes_with_its_inputs_number(runner):
    assert sorted(runner.run(double, list(range(7)), ticks)) == [(number, 2 * number) for number in range(7)]
    assert runner.num_retries == 0


@pytest.mark.parametrize("how", ["store", "disk", "killed"])
def test_passing_failures_are_tried_again_counted_and_said(how, tmp_path, caplog):
    runner = OnRay()
    assert list(runner.run(fail_at_first, [(str(tmp_path), how, 2)], ticks)) == [(0, how)]
    assert runner.num_retries == 2
    assert "a task is tried again (1 of 3)" in caplog.text


@pytest.mark.parametrize(("how", "error"), [("store", StoreError), ("disk", OSError), ("killed", ClusterError)])
def test_lasting_failures_end_in_the_error_itself(how, error, tmp_path):
    with pytest.raises(error):
        list(OnRay().run(fail_at_first, [(str(tmp_path), how, 99)], ticks))
    assert len(list(tmp_path.iterdir())) == 1 + MAX_RETRIES


@pytest.mark.parametrize(("how", "error"), [("data", DataError), ("bug", ValueError)])
def test_other_errors_are_not_tried_again(how, error, tmp_path):
    with pytest.raises(error):
        list(OnRay().run(fail_at_first, [(str(tmp_path), how, 99)], ticks))
    assert len(list(tmp_path.iterdir())) == 1


KILL_RAYS_AGENT = """
import os, signal, time
from pathlib import Path
from cvft.errors import ClusterError
from jobs.cluster import start_ray
from pipeline.ray_tasks import OnRay

def kill_agents(_):
    parent = os.getppid()  # the raylet, which does not survive its agents
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if Path(f"/proc/{child}/cmdline").read_bytes().startswith((b"ray::RuntimeEnvAgent", b"ray::DashboardAgent")):
            os.kill(int(child), signal.SIGKILL)
    time.sleep(60)

start_ray(num_cpus=1, include_dashboard=False, log_to_driver=False)
try:
    list(OnRay().run(kill_agents, [0], lambda: None))
except ClusterError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_ray_that_ends_is_told_in_one_line():
    done = subprocess.run(
        [sys.executable, "-c", KILL_RAYS_AGENT],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert re.search(r"^Ray ended \(.+\); what is finished is kept, start it again$", done.stdout, re.MULTILINE), done
