"""The one interface over folders and object stores: whole files or none, one winner of a create-only write."""

from __future__ import annotations

import os
import resource

import pytest

from cvft.errors import StoreError
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


@pytest.mark.parametrize(("uri", "message"), [("gs://b/x", "unknown scheme 'gs'"), ("s3://", "names no bucket")])
def test_uri_that_names_no_store_is_refused(uri, message):
    with pytest.raises(StoreError, match=message):
        Store.from_uri(uri)


def test_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot write it"):
        Store.from_uri(tmp_path / "file").write_bytes("a", b"1")
