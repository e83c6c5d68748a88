"""Functions over many inputs in this process and in several: numbered outputs, errors as they are."""

from __future__ import annotations

import os
import signal

import pytest

from cvft.errors import ClusterError, ConfigError, DataError
from pipeline.runner import Here, Processes


def ticks() -> None:
    """Do nothing while waiting."""


def double_here(content: int) -> tuple[int, int]:
    return 2 * content, os.getpid()


def fail(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise DataError("bad")


def test_every_output_comes_with_its_inputs_number_from_several_processes():
    outputs = dict(Processes(2).run(double_here, range(8), ticks))
    assert {number: value for number, (value, _) in outputs.items()} == {n: 2 * n for n in range(8)}
    assert os.getpid() not in {process for _, process in outputs.values()}


def test_this_process_runs_one_after_the_other():
    assert list(Here().run(double_here, [3, 1], ticks)) == [(0, (6, os.getpid())), (1, (2, os.getpid()))]


@pytest.mark.parametrize(("how", "error"), [("data", DataError), ("killed", ClusterError)])
def test_failures_end_in_an_error_that_says_why(how, error):
    with pytest.raises(error, match={"data": "bad", "killed": "a process was killed"}[how]):
        list(Processes(1).run(fail, [how], ticks))


def test_no_process_is_refused():
    with pytest.raises(ConfigError, match="num_processes: 0"):
        Processes(0)
