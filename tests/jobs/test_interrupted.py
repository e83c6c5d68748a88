"""Ctrl-C ends every job alike: one line, exit code 130, and the same command goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.search import run
from tests.jobs.conftest import NO_PICTURES, TINY

LINE = "cvft {}: interrupted; the same command continues where it can"


def interrupt(job, arguments, *, seen):
    """Begin a job, send it SIGINT once its log says so, and return its exit code and what it said after that."""
    command = [sys.executable, "-m", f"jobs.{job}", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            lines = []
            while not lines or seen not in lines[-1]:
                lines.append(running.stderr.readline())
                assert lines[-1], f"it ended: {lines}"
            running.send_signal(signal.SIGINT)
            _, rest = running.communicate(timeout=300)
        finally:
            running.kill()
    return running.returncode, rest


def test_a_job_without_ray(tmp_path):
    code, rest = interrupt(
        "synthesize", ["--out", str(tmp_path), "--pairs", "5000", "--workers", "1"], seen="rendering"
    )
    assert (code, rest.splitlines()[-1]) == (130, LINE.format("synthesize"))
    assert "Traceback" not in rest


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("job", "how", "seen"),
    [
        ("train", ["--config", "town", "train.workers=2"], "epoch 1/"),
        ("tune", ["--spec", "town", "--trials", "2"], ", best "),  # of a trial that runs, or was stopped early
    ],
)
def test_a_job_that_ray_would_end_in_its_own_way(job, how, seen, manifest_uri, tracking_uri, tmp_path):
    places = [f"data.manifest={manifest_uri}", f"output={tmp_path}/runs"]
    data = places if job == "train" else ["--out", str(tmp_path / "search"), "--manifest", manifest_uri]
    settings = [*TINY, NO_PICTURES, f"tracking.uri={tracking_uri}", "train.num_epochs=2000"]
    code, rest = interrupt(job, [*how, *data, *settings], seen=seen)
    assert (code, rest.splitlines()[-1]) == (130, LINE.format(job))
    assert "Traceback" not in rest


def test_an_interrupted_search_says_so_while_tune_still_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "environ", dict(os.environ))  # a search sets there what Tune reads
    monkeypatch.setattr(run, "Events", lambda search: None)
    ended, writer = threading.Event(), []

    def write(folder):
        number = 0
        while not ended.is_set():
            with contextlib.suppress(FileNotFoundError, FileExistsError):  # taken away between two looks of mkdir
                folder.mkdir(exist_ok=True)
                (folder / str(number := number + 1)).touch()

    def interrupted(search, events, local):
        writer.append(threading.Thread(target=write, args=(Path(local, "tune"),), daemon=True))
        writer[0].start()
        while not Path(local, "tune", "100").exists():
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_fit", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.run_search(SimpleNamespace(has_work=True))
    finally:
        ended.set()
        for thread in writer:
            thread.join()
