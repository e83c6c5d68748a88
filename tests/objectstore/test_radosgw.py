"""Ceph's gateway keeps the store's promises, and says no in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from pyarrow import fs

from cvft.errors import StoreError
from pipeline.s3_upload import PART_BYTES
from pipeline.storage import Store
from tests.objectstore.conftest import SCRIPT, start_radosgw, stop_radosgw
from tests.ports import free_ports
from tests.store_contract import StoreContract

pytestmark = pytest.mark.objectstore


class TestRadosgw(StoreContract):
    @pytest.fixture
    def store(self, radosgw_uri) -> Store:
        return Store.from_uri(radosgw_uri)


def _refusals(store: Store) -> list[str]:
    """The messages of every kind of request."""
    messages = []
    for request in (
        lambda: store.exists("a"),
        lambda: store.list(),
        lambda: store.read_bytes("a"),
        lambda: store.read_range("a", 0, 1),
        lambda: store.read_versioned("a"),
        lambda: store.write_bytes("a", b"1"),
        lambda: store.write_bytes("a", bytes(2 * PART_BYTES)),
        lambda: store.create_bytes("a", b"1"),
        lambda: store.replace_bytes("a", b"1", '"0"'),
        lambda: store.delete("a"),
    ):
        with pytest.raises(StoreError, match=r"^s3://[^\n]*$") as caught:
            request()
        messages.append(str(caught.value))
    return messages


def test_wrong_secret_is_one_line_that_names_the_variable(radosgw_uri, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for message in _refusals(Store.from_uri(radosgw_uri)):
        assert "the secret key is wrong; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message


def test_unknown_key_is_one_line_that_names_the_variable(radosgw_uri, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    for message in _refusals(Store.from_uri(radosgw_uri)):
        assert "the server does not know this access key; check AWS_ACCESS_KEY_ID" in message


def test_missing_bucket_is_one_line_that_names_it(radosgw_uri):
    for message in _refusals(Store.from_uri("s3://no-such-bucket/data")):
        assert "there is no bucket 'no-such-bucket'; create it" in message


def test_failed_upload_leaves_no_parts_in_the_bucket(radosgw_uri):
    def fail_half_way() -> None:
        with Store.from_uri(radosgw_uri).open_output("a") as stream:
            stream.write(bytes(5 * PART_BYTES))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    bucket = radosgw_uri.split("/")[2]
    assert "Uploads" not in boto3.session.Session().client("s3").list_multipart_uploads(Bucket=bucket)


def test_arrow_writes_and_reads_the_same_files(radosgw_uri):
    store = Store.from_uri(radosgw_uri)
    filesystem, root = store.arrow
    with filesystem.open_output_stream(f"{root}/a.bin") as stream:
        stream.write(b"12345")
    assert store.read_bytes("a.bin") == b"12345"
    assert filesystem.get_file_info(f"{root}/a.bin").type == fs.FileType.File


_STREAM = """
import json, os, sys
from pipeline.storage import Store
from tests.memory import peak_growth_bytes

store = Store.from_uri(sys.argv[1])
store.exists("a")
chunk = os.urandom(100_000)

def write():
    with store.open_output("a") as stream:
        for _ in range(3000):
            stream.write(chunk)

def read():
    with store.open_input("a") as stream:
        while stream.read(1 << 20):
            pass

print(json.dumps([peak_growth_bytes(write), peak_growth_bytes(read), store.size("a")]))
"""


def test_memory_stays_bounded_while_300_mb_stream_by(radosgw_uri):
    done = subprocess.run([sys.executable, "-c", _STREAM, radosgw_uri], capture_output=True, text=True, check=True)
    writing_bytes, reading_bytes, num_bytes = json.loads(done.stdout)
    assert num_bytes == 300_000_000
    # 64 MiB of parts and what the allocator keeps beside them: far from the 286 MiB that went by.
    assert 10 << 20 < writing_bytes < 128 << 20
    assert reading_bytes < 20 << 20


def test_a_gateway_that_was_stopped_goes_on_with_what_it_held(tmp_path, monkeypatch):
    port, mon_port = free_ports(2)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    try:
        found = start_radosgw(tmp_path, port=port, mon_port=mon_port)
        for name, value in found.items():
            monkeypatch.setenv(name, value)
        boto3.session.Session().client("s3").create_bucket(Bucket="kept")
        store = Store.from_uri("s3://kept/data")
        store.write_bytes("a", b"1")
        stop_radosgw(tmp_path)
        assert start_radosgw(tmp_path, port=port, mon_port=mon_port) == found
        assert Store.from_uri("s3://kept/data").read_bytes("a") == b"1"
    finally:
        stop_radosgw(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 GB, which takes 0.2 GB of this one's."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(20 << 30)
    script = 'mkfs.ext4 -q -m 0 "$0" && mount -o loop "$0" "$1"'
    mounted = subprocess.run(["bash", "-c", script, image, folder], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a disk can be mounted by root only: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def _leave_mb(folder: Path, num_mb: int) -> None:
    """Take all of a disk but so much."""
    with (folder / f"but-{num_mb}").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - (num_mb << 20))


def test_room_is_counted_in_megabytes_and_not_in_percent_of_the_disk(small_disk):
    port, mon_port = free_ports(2)
    _leave_mb(small_disk, 390)  # of 20,000: a monitor left to itself refuses what is under two percent
    try:
        start_radosgw(small_disk / "store", port=port, mon_port=mon_port)
    finally:
        stop_radosgw(small_disk / "store")
    _leave_mb(small_disk, 290)
    started = subprocess.run(
        [SCRIPT, "start", small_disk / "other", str(port)], capture_output=True, text=True, check=False
    )
    assert started.returncode == 1
    assert re.fullmatch(
        rf"radosgw.sh: {small_disk}/other is on a disk with \d+ MB free, and a store begins with 300 MB; "
        "make room, or name a folder elsewhere\n",
        started.stderr,
    )
