"""Background calls run in order and pass on what they return or raise; they never keep a program from ending."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import pytest

from pipeline.background import BackgroundThreads


def test_calls_run_in_their_order_and_give_results_or_errors():
    threads = BackgroundThreads(1, name="test")
    done = []
    futures = [threads.submit(done.append, number) for number in range(20)]
    failing = threads.submit(int, "no number")
    after = threads.submit(int, "7")
    assert after.result() == 7
    assert done == list(range(20))
    assert [future.result() for future in futures] == [None] * 20
    with pytest.raises(ValueError, match="no number"):
        failing.result()


def test_cancelled_call_does_not_run():
    threads = BackgroundThreads(1, name="test")
    gate = threading.Event()
    threads.submit(gate.wait)
    second = threads.submit(pytest.fail)
    assert second.cancel()
    gate.set()
    assert threads.submit(int, "1").result() == 1


def test_threads_end_with_the_object():
    threads = BackgroundThreads(2, name="ending")
    assert threads.submit(int, "1").result() == 1
    del threads
    gc.collect()
    for _ in range(100):
        if not any(thread.name.startswith("ending") for thread in threading.enumerate()):
            return
        time.sleep(0.02)
    pytest.fail("the threads live on")


def test_program_that_fails_does_not_wait_for_queued_calls():
    program = (
        "import time; from pipeline.background import BackgroundThreads\n"
        "threads = BackgroundThreads(2, name='test')\n"
        "[threads.submit(time.sleep, 600) for _ in range(10)]\n"
        "raise SystemExit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=300, check=False).returncode == 3
