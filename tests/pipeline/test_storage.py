"""The one interface over folders and object stores: whole files or none, one winner of a create-only write."""

from __future__ import annotations

import os
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest

from cvft.errors import StoreError
from pipeline.s3 import CHECKSUM_VARIABLES
from pipeline.storage import FileStatus, Store


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.objectstore)])
def store(request, tmp_path) -> Store:
    uri = str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_uri")
    return Store.from_uri(uri)


def test_written_bytes_come_back(store):
    store.write_bytes("a/b.bin", b"first")
    store.write_bytes("a/b.bin", b"second")
    assert store.read_bytes("a/b.bin") == b"second"
    assert store.exists("a/b.bin")
    assert store.size("a/b.bin") == 6


def test_stream_comes_back_from_any_position(store):
    content = bytes(range(256)) * 40_000  # 10 MB: more than one part of a multipart upload
    with store.open_output("big.bin") as stream:
        for start in range(0, len(content), 1_000_000):
            stream.write(content[start : start + 1_000_000])
    assert store.size("big.bin") == len(content)
    with store.open_input("big.bin") as stream:
        stream.seek(9_000_000)
        assert stream.read(100) == content[9_000_000:9_000_100]


def test_listing_is_recursive_sorted_and_relative(store):
    for path in ("x/2.bin", "x/y/1.bin", "z.bin"):
        store.write_bytes(path, b"1")
    assert store.list() == ["x/2.bin", "x/y/1.bin", "z.bin"]
    assert store.list("x") == ["x/2.bin", "x/y/1.bin"]
    assert store.list("nothing") == []


def test_range_is_read_exactly_or_refused(store):
    store.write_bytes("a.bin", b"0123456789")
    assert store.read_range("a.bin", 3, 4) == b"3456"
    assert store.read_range("a.bin", 0, 10) == b"0123456789"
    assert store.read_range("a.bin", 10, 0) == b""
    for start in (8, 10, 99):
        with pytest.raises(StoreError, match=rf"a\.bin: has no bytes {start} to {start + 4}"):
            store.read_range("a.bin", start, 4)
    with pytest.raises(StoreError, match=r"no\.bin: cannot read it: there is no such file"):
        store.read_range("no.bin", 0, 1)


def test_listing_tells_sizes_and_a_stamp_that_changes_with_the_content(store):
    store.write_bytes("x/1.bin", b"12345")
    before = store.list_sizes("x")
    assert before == {"x/1.bin": store.status("x/1.bin")}
    assert isinstance(before["x/1.bin"], FileStatus)
    assert before["x/1.bin"].num_bytes == 5
    store.write_bytes("x/1.bin", b"54321")
    after = store.list_sizes()["x/1.bin"]
    assert after.num_bytes == 5
    assert after.stamp != before["x/1.bin"].stamp


def test_absent_file_is_told_by_name(store):
    assert not store.exists("no.bin")
    assert store.size("no.bin") is None
    with pytest.raises(StoreError, match=r"store/no\.bin|data/no\.bin"):
        store.read_bytes("no.bin")


def test_block_that_fails_leaves_no_file(store):
    def fail_half_way() -> None:
        with store.open_output("half.bin") as stream:
            stream.write(b"half of it")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert store.list() == []


def test_blocks_own_errors_stay_what_they_are(store, tmp_path):
    store.write_bytes("a.bin", b"1")
    for opened in (store.open_output("b.bin"), store.open_input("a.bin")):
        with pytest.raises(FileNotFoundError, match=r"not-the-stores\.jpg"), opened:
            (tmp_path / "not-the-stores.jpg").read_bytes()
    assert store.list() == ["a.bin"]


def test_full_disk_is_the_stores_error_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StoreError, match=r"a\.bin: cannot write it: .*File too large"):
            Store.from_uri(tmp_path).write_bytes("a.bin", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_create_only_write_refuses_an_existing_name(store):
    assert store.create_bytes("m.bin", b"first")
    assert not store.create_bytes("m.bin", b"second")
    assert store.read_bytes("m.bin") == b"first"
    assert store.list() == ["m.bin"]


def test_racing_creators_have_one_winner(store):
    contents = [bytes([number]) * 10 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda content: store.create_bytes("m.bin", content), contents))
    assert sum(wins) == 1
    assert store.read_bytes("m.bin") == contents[wins.index(True)]


def test_swap_needs_the_version_that_was_read(store):
    assert store.read_versioned("p.json") is None
    assert not store.replace_bytes("p.json", b"x", "0123456789abcdef")
    assert store.replace_bytes("p.json", b"first", None)
    assert not store.replace_bytes("p.json", b"other", None)
    content, version = store.read_versioned("p.json")
    assert content == b"first"
    assert store.replace_bytes("p.json", b"second", version)
    assert not store.replace_bytes("p.json", b"third", version)
    assert store.read_bytes("p.json") == b"second"
    assert store.list() == ["p.json"]


def test_racing_swaps_lose_no_update(store):
    store.write_bytes("count", b"0")
    losses = []

    def count_up(_: int) -> None:
        while True:
            content, version = store.read_versioned("count")
            if store.replace_bytes("count", str(int(content) + 1).encode(), version):
                return
            losses.append(version)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count_up, range(24)))
    assert store.read_bytes("count") == b"24"
    assert store.list() == ["count"]


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


@pytest.mark.objectstore
def test_missing_bucket_is_one_clear_line(s3_uri):
    with pytest.raises(StoreError, match="s3://no-such-bucket-here/x/a: cannot write it") as caught:
        Store.from_uri("s3://no-such-bucket-here/x").write_bytes("a", b"1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("uri", "message"), [("gs://b/x", "unknown scheme 'gs'"), ("s3://", "names no bucket")])
def test_uri_that_names_no_store_is_refused(uri, message):
    with pytest.raises(StoreError, match=message):
        Store.from_uri(uri)


def test_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot write it"):
        Store.from_uri(tmp_path / "file").write_bytes("a", b"1")
