"""`shard` killed by SIGKILL, driver or worker, and started again ends with the digest of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.build import BuildOptions, build_shards
from pipeline.manifest import Manifest
from pipeline.plan import Cut
from pipeline.runner import Here

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def start(root: Path, store: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.shard", "--root", root, "--store", store, "--pairs-per-shard", "2"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def processes() -> Iterator[tuple[int, int, str]]:
    """Yield id, parent and command line of every process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            yield int(folder.name), parent, (folder / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue


def descendants(pid: int) -> dict[int, str]:
    """Return id and command line of every process below `pid`."""
    found: dict[int, str] = {}
    family = {pid}
    table = list(processes())
    while new := {child: line for child, parent, line in table if parent in family and child not in found}:
        found |= new
        family |= set(new)
    return found


def wait_for(condition, timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_end_of(family: dict[int, str], timeout_s: float = 600.0) -> None:
    """Wait until none of the processes is left, zombies aside; Ray's parts look for their parent every few seconds."""
    deadline = time.monotonic() + timeout_s
    while left := [line for pid, _, line in processes() if line and family.get(pid) == line]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def num_finished(store: Path) -> int:
    return len(list(store.glob("shards/*/*.json")))


@pytest.fixture
def undisturbed(town, tmp_path) -> str:
    options = BuildOptions(cut=Cut(pairs_per_shard=2))
    return build_shards(town, str(tmp_path / "undisturbed"), options, runner=Here()).digest


def test_driver_killed_at_any_moment_goes_on_and_leaves_no_ray_behind(town, tmp_path, undisturbed):
    store, moments = tmp_path / "store", random.Random(0)
    for num_shards in (0, moments.randrange(1, 6)):
        job = start(town, store)
        goal = num_finished(store) + num_shards
        try:
            wait_for(lambda goal=goal: (store / "plans").exists() and num_finished(store) >= goal)
            time.sleep(moments.uniform(0, 0.3))
            family = descendants(job.pid)
        finally:
            job.kill()
            job.communicate()
        wait_for_end_of(family)
    job = start(town, store)
    stdout, stderr = job.communicate()
    assert job.returncode == 0, stderr
    result = json.loads(stdout)
    assert result["digest"] == undisturbed
    assert result["shards_written"] < result["shards"]
    assert "shards were finished by an earlier run" in stderr
    keys = Manifest.load(str(store)).pairs["key"].to_pylist()
    assert len(keys) == len(set(keys)) == 16


def test_killed_worker_is_replaced(town, tmp_path, undisturbed):
    store = tmp_path / "store"
    job = start(town, store)

    def worker() -> int | None:
        lines = descendants(job.pid).items()
        return next((pid for pid, line in lines if "ray::" in line and "_run_later" in line), None)

    try:
        wait_for(lambda: worker() is not None or job.poll() is not None)
        victim = worker()
        if victim is not None:  # else the machine was faster than we looked
            os.kill(victim, signal.SIGKILL)
        stdout, stderr = job.communicate(timeout=600)
    finally:
        job.kill()
    assert job.returncode == 0, stderr
    assert json.loads(stdout)["digest"] == undisturbed
