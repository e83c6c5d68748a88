"""`cvft submit` on a real head with the real autoscaler, whose nodes are processes of this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster]

ROOT = Path(__file__).parents[2]
CLUSTER = str(ROOT / "infra" / "local" / "cluster.sh")


def free_port() -> int:
    """A port that is free, and the next one with it."""
    while True:
        with socket.socket() as one, socket.socket() as next_one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                next_one.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


@pytest.fixture(scope="module")
def cluster():
    """The environment of a client of a cluster of our own, with a token."""
    ours = {"PARTS": "ray", "PYTHON": sys.executable, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    # Ray makes sockets in it, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ports = {"RAY_PORT": str(free_port()), "DASHBOARD_PORT": str(free_port())}
        start = [CLUSTER, "start", folder]
        started = subprocess.run(start, env=plain | ours | ports, capture_output=True, text=True, check=False)
        try:
            assert started.returncode == 0, started.stderr
            exports = (line.removeprefix("export ").partition("=") for line in started.stdout.splitlines())
            client = plain | ours | {name: value for name, _, value in exports}
            yield {name: value for name, value in client.items() if name != "CVFT_WORKING_DIR"}  # code is sent
        finally:
            subprocess.run([CLUSTER, "stop", folder], env=plain, check=True)


class Submit(subprocess.Popen):
    """`cvft submit ...`, begun."""

    def __init__(self, environment, *arguments):
        command = [sys.executable, "-m", "jobs.submit", *arguments]
        pipe = subprocess.PIPE
        super().__init__(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)

    def end(self):
        """Wait for it; return exit code, the result if there is one, and what was said."""
        out, err = self.communicate(timeout=180)
        return self.returncode, json.loads(out.splitlines()[-1]) if out else None, err


@pytest.fixture
def ask(cluster):
    """Run `cvft submit` to its end. A process each time: Ray reads how to authenticate once."""
    return lambda *arguments: Submit(cluster, *arguments).end()


def statuses(ask):
    _, listed, _ = ask("--list")
    return {job["id"]: job["status"] for job in listed["jobs"]}


def test_two_submitters_of_one_request_see_one_job_and_end_as_it_does(cluster, ask):
    command = ["evaluate", "--checkpoint", "/no/checkpoint", "--manifest", "/no/store"]
    both = [Submit(cluster, *command), Submit(cluster, *command)]
    for code, result, err in (each.end() for each in both):
        assert code == 2
        assert result is None
        assert "cvft evaluate: error: /no/checkpoint: no checkpoint here" in err
        assert err.splitlines()[-1].endswith("ended with exit code 2")
    assert [status for name, status in statuses(ask).items() if name.startswith("evaluate-")] == ["FAILED"]


def test_a_job_that_needs_a_cpu_brings_a_node_and_what_has_finished_is_found_again(ask, tmp_path):
    command = ["synthesize", "--out", str(tmp_path / "town"), "--pairs", "2", "--workers", "1"]
    code, result, err = ask(*command)
    assert (code, result["num_written"]) == (0, 2), err
    code, again, err = ask(*command)
    assert (code, again) == (0, result)
    assert "is the same request and has finished; --again runs it once more" in err


def test_ctrl_c_leaves_the_job_and_stop_ends_it(cluster, ask, tmp_path):
    command = ["--num-cpus", "0", "synthesize", "--out", str(tmp_path / "town"), "--pairs", "5000", "--workers", "1"]
    following = Submit(cluster, "--name", "long", *command)
    while "rendering" not in following.stderr.readline():
        assert following.poll() is None
    following.send_signal(signal.SIGINT)
    code, _, err = following.end()
    assert code == 130
    assert "long goes on without you; follow it: cvft submit --address " in err
    assert statuses(ask)["long"] == "RUNNING"
    code, _, err = ask("--name", "long", "verify", "--manifest", "/no/store")
    assert code == 2
    assert "--name long: long is another job (python -m jobs.synthesize" in err
    assert ask("--stop", "long")[0] == 0
    code, _, err = ask("--attach", "long")
    assert code == 1
    assert err.splitlines()[-1] == "cvft submit: long was stopped"


def test_what_no_node_can_hold_is_refused_at_once(ask):
    began = time.monotonic()
    code, _, err = ask("--num-cpus", "64", "verify", "--manifest", "/no/store")
    assert code == 2
    assert "no type of node of http://127.0.0.1:" in err
    assert "holds CPU 64, now or later" in err
    code, _, err = ask("evaluate", "--use-gpu", "--checkpoint", "/c", "--manifest", "/m")
    assert code == 2
    message = "cvft evaluate: error: --use-gpu: 1 x 1 CPU + 1 GPU cannot be had"
    assert message in err
    assert "no type of node that its autoscaler may add holds them" in err
    assert time.monotonic() - began < 170  # Ray itself waits for 15 minutes


def test_a_wrong_token_is_one_line(cluster):
    environment = {name: value for name, value in cluster.items() if name != "RAY_AUTH_TOKEN_PATH"}
    code, _, err = Submit(environment | {"RAY_AUTH_TOKEN": "0" * 64}, "--list").end()
    assert code == 2
    assert err.count("\n") == 1
    assert "refuses this client (Authentication failed: Forbidden: Invalid authentication token)" in err


def test_where_no_cluster_answers_is_one_line(ask):
    code, _, err = ask("--address", "http://127.0.0.1:1", "--list")
    assert code == 2
    assert err == (
        "cvft submit: error: http://127.0.0.1:1: no Ray job server answers there; name the cluster's with "
        "--address http://HEAD:8265 or RAY_API_SERVER_ADDRESS\n"
    )
