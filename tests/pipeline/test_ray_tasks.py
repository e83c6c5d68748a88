"""Inputs are run in a bounded window; what failed for a passing reason is tried again, a lost worker too."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cvft.errors import ClusterError, DataError, StoreError
from pipeline.ray_tasks import MAX_RETRIES, Here, OnRay

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
