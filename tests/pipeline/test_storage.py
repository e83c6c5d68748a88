"""The one interface over folders and object stores: whole files or none, one winner of a create-only write."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cvft.errors import StoreError
from pipeline.raw import RawFolder
from pipeline.s3 import CHECKSUM_VARIABLES
from pipeline.storage import Store
from tests.store_contract import StoreContract


class TestStore(StoreContract):
    @pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.objectstore)])
    def store(self, request, tmp_path) -> Store:
        uri = str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_uri")
        return Store.from_uri(uri)


def test_full_disk_is_the_stores_error_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StoreError, match=r"a\.bin: cannot write it: .*File too large"):
            Store.from_uri(tmp_path).write_bytes("a.bin", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


class TestDisk:
    """A real file system of one megabyte."""

    @pytest.fixture
    def disk(self, tmp_path) -> Iterator[Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False, capture_output=True
        )
        if mounted.returncode:
            pytest.skip("only root can mount a small disk")
        yield disk
        subprocess.run(["umount", disk], check=True)

    def test_full_disk_is_one_line_and_leaves_what_was_there(self, disk):
        store = Store.from_uri(disk)
        store.write_bytes("kept.bin", b"kept")
        _, version = store.read_versioned("kept.bin")
        for write in (
            lambda: store.write_bytes("a.bin", bytes(3_000_000)),
            lambda: store.write_bytes("kept.bin", bytes(3_000_000)),
            lambda: store.create_bytes("b.bin", bytes(3_000_000)),
            lambda: store.replace_bytes("kept.bin", bytes(3_000_000), version),
        ):
            with pytest.raises(StoreError, match=r"\.bin: cannot write it: the disk is full; free some space"):
                write()
        assert [path.name for path in disk.iterdir()] == ["kept.bin"]
        assert store.read_bytes("kept.bin") == b"kept"

    def test_read_only_disk_is_one_line(self, disk):
        store = Store.from_uri(disk)
        store.write_bytes("a.bin", b"1")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for change in (lambda: store.write_bytes("b.bin", b"1"), lambda: store.delete("a.bin")):
            with pytest.raises(StoreError, match=r"\.bin: cannot \w+ it: the file system is read-only"):
                change()
        assert store.read_bytes("a.bin") == b"1"


def test_files_being_written_are_not_listed(tmp_path):
    store = Store.from_uri(tmp_path)
    with store.open_output("a.bin") as stream:
        stream.write(b"1")
        assert list(tmp_path.iterdir())
        assert store.list() == []
    assert store.list() == ["a.bin"]


def test_file_uri_and_plain_path_are_the_same_store(tmp_path):
    Store.from_uri(tmp_path).write_bytes("a", b"1")
    other = Store.from_uri(f"file://{tmp_path}")
    assert other.read_bytes("a") == b"1"
    assert other.uri("a") == str(tmp_path / "a")
    assert other.local_path("a") == tmp_path / "a"


def test_file_uri_is_decoded_and_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store.from_uri(f"file://{tmp_path}/my%20data").uri("a") == str(tmp_path / "my data/a")
    assert Store.from_uri("file://data").uri("a") == str(tmp_path / "data/a")


@pytest.mark.objectstore
def test_remote_store_names_its_files_and_sets_the_checksum_variables(s3_uri):
    store = Store.from_uri(s3_uri)
    assert store.uri("a/b") == f"{s3_uri}/a/b"
    assert store.local_path("a/b") is None
    assert not store.exists("a/b")
    assert {os.environ[name] for name in CHECKSUM_VARIABLES} == {"when_required"}


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://b/x", "unknown scheme 'gs'"),
        ("s3://", "names no bucket"),
        ("s3:///prefix", "names no bucket"),
        ("s3:/bucket/prefix", "write s3://bucket/prefix"),
        ("", "names no folder"),
    ],
)
def test_uri_that_names_no_store_is_refused(uri, message):
    with pytest.raises(StoreError, match=message):
        Store.from_uri(uri)
    with pytest.raises(StoreError, match=message):
        RawFolder.from_uri(uri)


def test_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot write it"):
        Store.from_uri(tmp_path / "file").write_bytes("a", b"1")


def test_file_that_vanishes_while_a_folder_is_listed_hides_no_other(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"1")
    scandir = os.scandir

    @contextmanager
    def while_another_job_deletes(folder):
        with scandir(folder) as entries:
            known = list(entries)
        Path(known[0].path).unlink()
        yield known

    monkeypatch.setattr(os, "scandir", while_another_job_deletes)
    listed = Store.from_uri(tmp_path).list()
    assert (listed, len(listed)) == (sorted(path.name for path in tmp_path.iterdir()), 2)
