"""A Ray of its own, jobs on it, and a real Prometheus that scrapes it with the configuration of `infra/monitoring`.

Run by `make test-monitoring`; without Debian's package prometheus all of it is skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "infra" / "monitoring"
START_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray that runs, and the environment of jobs on it."""

    folder: Path
    dashboard: str
    environment: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Prometheus:
    """A Prometheus that runs."""

    address: str

    def api(self, path: str, **query: Any) -> Any:
        url = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.load(answer)["data"]


@contextlib.contextmanager
def _running(command: list[str], log: Path, *, until: str, **options: Any) -> Iterator[None]:
    """Run a process as long as the block lasts, from when it has said that it is ready."""

    def begin() -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, **options)

    process = begin()
    try:
        deadline = time.monotonic() + START_S
        while until not in log.read_text(encoding="utf-8", errors="replace"):
            told = log.read_text(encoding="utf-8", errors="replace")
            if process.poll() is not None:
                assert "timed out during startup" in told, told  # of Ray, whose parts miss deadlines of their own
                process = begin()
            assert time.monotonic() < deadline, f"{command[0]} did not start"
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=START_S)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The AWS variables of an S3 server with a bucket `cvft`: shards that are elsewhere go through the node's cache."""
    (port,) = free_ports(1)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    log = tmp_path_factory.mktemp("s3") / "log"
    with _running([sys.executable, str(ROOT / "tests/s3_server.py"), str(port)], log, until="Running on"):
        client = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        client.create_bucket(Bucket="cvft")
        yield environment


@pytest.fixture(scope="session")
def cluster(store: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head with four CPUs that exports its metrics each second."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed: apt-get install --no-install-recommends prometheus")
    gcs, dashboard, metrics, listen, grpc, client = free_ports(6)
    cache = tmp_path_factory.mktemp("cache")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))},
        **store,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": str(ROOT),
    }
    # Ray makes sockets in it, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=4"]
        command += ["--node-ip-address=127.0.0.1", f"--port={gcs}", f"--temp-dir={folder}"]
        command += [f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}"]
        command += [f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={grpc}"]
        command += [f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"]
        log = tmp_path_factory.mktemp("ray") / "log"
        with _running(command, log, until="Ray runtime started", env=environment):
            yield Cluster(
                folder=Path(folder),
                dashboard=f"http://127.0.0.1:{dashboard}",
                environment=environment | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"},
            )


@pytest.fixture(scope="session")
def prometheus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with `infra/monitoring/prometheus.yml`, but for this Ray's folder and one scrape a second."""
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copytree(MONITORING / "rules", folder / "rules")
    text = (MONITORING / "prometheus.yml").read_text(encoding="utf-8")
    assert "/tmp/ray/" in text
    text = text.replace("/tmp/ray/", f"{cluster.folder}/").replace("_interval: 10s", "_interval: 1s")
    (folder / "prometheus.yml").write_text(text)
    (port,) = free_ports(1)
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    with _running(command, folder / "log", until="Server is ready to receive web requests"):
        yield Prometheus(address=f"http://127.0.0.1:{port}")
