"""Ceph's S3 gateway for the whole session, and a new bucket on it for each test.

Run by `make test-objectstore`; without Ceph's packages all of it is skipped, and without PostgreSQL what needs it.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from tests.ports import free_ports

SCRIPT = Path(__file__).parents[2] / "infra/objectstore/radosgw.sh"
_BUCKETS = itertools.count()


@pytest.fixture(scope="session")
def radosgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The AWS variables of a gateway that runs as long as the session."""
    missing = subprocess.run([SCRIPT, "check"], capture_output=True, text=True, check=False)
    if missing.returncode:
        pytest.skip(missing.stderr.strip())
    folder = tmp_path_factory.mktemp("ceph")
    port, mon_port = free_ports(2)
    yield start_radosgw(folder, port=port, mon_port=mon_port)
    stop_radosgw(folder)


def start_radosgw(folder: Path, *, port: int, mon_port: int) -> dict[str, str]:
    """Start a gateway, or go on with the one of this folder, and return its AWS variables."""
    started = subprocess.run(
        [SCRIPT, "start", folder, str(port)],
        env=os.environ | {"MON_PORT": str(mon_port)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    return dict(re.findall(r"export (\w+)=(\S+)", started.stdout))


def stop_radosgw(folder: Path) -> None:
    """End a gateway and all that belongs to it."""
    subprocess.run([SCRIPT, "stop", folder], timeout=60, check=True)


@pytest.fixture
def radosgw_uri(radosgw: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in a new bucket; this process's AWS variables, and those of processes it starts, name the gateway."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in radosgw.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{next(_BUCKETS)}"
    boto3.session.Session().client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/data"
