"""Heads of our own for `cvft submit`, nodes beside them, and submitters as processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "infra" / "local" / "cluster.sh")
RAY = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
START_S = 600.0  # nobody waits that long but where something is wrong: tests share a busy machine
_NUMBERS = itertools.count()


class Cluster:
    """A head started by `cluster.sh`.

    Attributes:
        client: The environment of those who submit to it.
    """

    def __init__(self, folder: str, settings: dict[str, str]) -> None:
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        own = {"PARTS": "ray", "PYTHON": sys.executable, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}
        self._folder = folder
        port, dashboard_port = free_ports(2, width=2)  # Ray's client has the one next to it
        self._environment = plain | own | {"RAY_PORT": str(port), "DASHBOARD_PORT": str(dashboard_port)} | settings
        self.client: dict[str, str] = {}

    def start(self) -> None:
        exports = (line.removeprefix("export ").partition("=") for line in self._script("start").splitlines())
        named = {name: value for name, _, value in exports}
        self.client = {name: value for name, value in (self._environment | named).items() if name != "CVFT_WORKING_DIR"}

    def kill_head(self) -> None:
        """SIGKILL the head and all that runs on its node."""
        kill_tree(int(Path(self._folder, "head.pid").read_text()))

    def start_head_again(self) -> None:
        self._script("head")

    def stop(self) -> None:
        self._script("stop")

    @contextlib.contextmanager
    def node(self, *options: str) -> Iterator[subprocess.Popen]:
        """A node of two CPUs beside the head, which waits minutes for a head that is away."""
        address = f"127.0.0.1:{self._environment['RAY_PORT']}"
        zeros = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "min-worker-port", "max-worker-port")
        fixed = [f"--{name}=0" for name in zeros] + ["--object-store-memory=104857600", "--disable-usage-stats"]
        command = [sys.executable, "-c", RAY, "start", f"--address={address}", "--block", "--num-cpus=2", *fixed]
        given = {name: value for name, value in self.client.items() if name != "RAY_API_SERVER_ADDRESS"}
        given |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        given |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        log = Path(self._folder, f"node-{next(_NUMBERS)}.log")
        process = self._start_node([*command, *options], given, log)
        try:
            deadline = time.monotonic() + START_S
            while "Ray runtime started" not in log.read_text(errors="replace"):
                assert time.monotonic() < deadline, log.read_text(errors="replace")
                if process.poll() is not None:  # on a busy machine Ray's parts miss deadlines of their own
                    process = self._start_node([*command, *options], given, log)
                time.sleep(0.2)
            yield process
        finally:
            kill_tree(process.pid)
            process.wait()

    def _start_node(self, command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
        with log.open("a") as output:
            return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)

    def log_of(self, job_id: str) -> str:
        """What Ray has on disk of what a job printed."""
        return next(Path(self._folder, "ray").glob(f"session_2*/logs/job-driver-{job_id}.log")).read_text()

    def _script(self, command: str) -> str:
        done = subprocess.run(
            [SCRIPT, command, self._folder], env=self._environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextlib.contextmanager
def cluster(**settings: str) -> Iterator[Cluster]:
    """A cluster of our own, with a token."""
    # Ray makes sockets in it, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        given = {name: value.replace("FOLDER", f"{folder}/gcs") for name, value in settings.items()}
        ours = Cluster(folder, given)
        try:
            ours.start()
            yield ours
        finally:
            ours.stop()


def await_true(what: Callable[[], bool], *, timeout_s: float = 900) -> None:
    """Wait for what is to come about."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, f"it has not come about in {timeout_s} s"
        time.sleep(0.2)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that it has begun, if it is still there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)


class Submit(subprocess.Popen):
    """`cvft submit ...`, begun."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        command = [sys.executable, "-m", "jobs.submit", *arguments]
        pipe = subprocess.PIPE
        super().__init__(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)

    def end(self, *, timeout_s: float = 1500) -> tuple[int, dict[str, Any] | None, str]:
        """Wait for it; return exit code, the result if there is one, and what was said."""
        try:
            out, err = self.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not over after {timeout_s} s: {self.communicate()[1]}") from None
        return self.returncode, json.loads(out.splitlines()[-1]) if out else None, err


@contextlib.contextmanager
def submitters(environment: dict[str, str], *options: str) -> Iterator[Callable[..., Submit]]:
    """Begin submitters, each with `options`; those that have not ended by then are ended with it."""
    begun: list[Submit] = []

    def begin(*arguments: str) -> Submit:
        begun.append(Submit(environment, *options, *arguments))
        return begun[-1]

    try:
        yield begin
    finally:
        for submit in begun:
            submit.kill()
            submit.communicate()
