"""Fixtures shared by all tests: one local Ray and one local S3 server for the whole session.

Ray and boto3 are imported by the fixtures, so that the tests of `cvft` run where only torch is installed.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cutting_proxy import CuttingProxy
from tests.ports import free_ports

pytest.register_assert_rewrite("tests.store_contract")

_BUCKETS = itertools.count()


def pytest_configure() -> None:
    """Keep this machine's MLflow, this machine's speed and the shell that began them out of the tests.

    Hypothesis fails an example that takes longer than 0.2 s by itself: on a busy machine any does. What a script puts
    into the background ignores Ctrl-C, and so would all that it begins.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if importlib.util.find_spec("hypothesis"):
        from hypothesis import HealthCheck, settings  # noqa: PLC0415

        settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
        settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes (`make test`), what is dear to make is made in one of them: Ray, above all.

    The other tests stay together by file.
    """
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        group = "ray" if "ray_cluster" in names else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """A free port, named by the usual AWS variables from before Ray starts, because its workers inherit those."""
    (port,) = free_ports(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield port


@pytest.fixture(scope="session")
def ray_cluster(s3_port: int) -> Iterator[None]:
    # Ray 2.60 switches token authentication on by itself, and writes a token below the home folder, unless told.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray = pytest.importorskip("ray")
    from jobs.cluster import start_ray  # noqa: PLC0415 (imports ray)

    # Not below pytest's own folder: Ray makes sockets in it, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", ResourceWarning)
            start_ray(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def mlflow_schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sqlite file with MLflow's tables, to be copied: making them takes seconds."""
    server = pytest.importorskip("pipeline.tracking.server")
    file = tmp_path_factory.mktemp("mlflow") / "new folder" / "schema.db"
    server.prepare(f"sqlite:///{file}", experiment="unused")
    return file


@pytest.fixture(scope="session")
def _s3_server(s3_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with (tmp_path_factory.mktemp("moto") / "log").open("wb") as log:
        command = [sys.executable, str(Path(__file__).with_name("s3_server.py")), str(s3_port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        while not _is_open(s3_port):
            assert server.poll() is None, "the S3 server did not start"
            time.sleep(0.1)
        yield
        server.terminate()
        server.wait()


@pytest.fixture
def s3_uri(_s3_server: None) -> str:
    """A new bucket on an S3 server of our own."""
    bucket = f"bucket-{next(_BUCKETS)}"
    pytest.importorskip("boto3").client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/data"


@pytest.fixture
def s3_proxy(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[CuttingProxy]:
    """The S3 server behind a network that can break; nobody waits long before trying again."""
    proxy = CuttingProxy(s3_port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("pipeline.patience.FIRST_PAUSE_S", 0.05)
    yield proxy
    proxy.close()


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
