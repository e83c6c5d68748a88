"""A raw folder is the same to its readers wherever it lies."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest

from cvft.errors import DataError, StoreError
from pipeline.raw import RawFolder
from pipeline.sources.detect import open_source
from pipeline.storage import Store


def upload(root: Path, uri: str) -> str:
    store = Store.from_uri(uri)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            store.write_bytes(path.relative_to(root).as_posix(), path.read_bytes())
    return uri


def test_status_tells_length_and_changes(tmp_path):
    root = RawFolder.from_uri(tmp_path)
    (tmp_path / "a").write_bytes(b"123")
    before = root.status("a")
    assert before.num_bytes == 3
    os.utime(tmp_path / "a", ns=(1, 1))
    assert root.status("a") != before
    assert root.status("a").stamp == "1"


@pytest.mark.parametrize("path", ["nothing", "folder", "folder/nothing", "null\0byte", "pipe"])
def test_what_is_no_file_has_no_status(path, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert RawFolder.from_uri(tmp_path).status(path) is None


def test_names_are_those_directly_below_and_sorted(tmp_path):
    (tmp_path / "b/c").mkdir(parents=True)
    (tmp_path / "a").touch()
    root = RawFolder.from_uri(tmp_path)
    assert (root.names(), root.names("b"), root.names("a"), root.names("x")) == (["a", "b"], ["c"], [], [])
    assert (root.has(), root.has("b"), root.has("b/c"), root.has("x")) == (True, True, True, False)


def test_absolute_path_is_read_where_it_is(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    assert RawFolder.from_uri(tmp_path / "elsewhere").read_bytes(str(tmp_path / "a")) == b"1"


def test_relative_root_means_the_folder_it_meant_when_it_was_opened(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    monkeypatch.chdir(tmp_path)
    root = RawFolder.from_uri("raw")
    monkeypatch.chdir("/")
    assert root.uri == str(tmp_path / "raw")
    assert RawFolder.from_uri(f"file://{tmp_path}/raw") == root


def test_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"nothing: cannot be read: No such file or directory$"):
        RawFolder.from_uri(tmp_path).read_bytes("nothing")


def test_text_drops_the_byte_order_mark_and_keeps_odd_bytes(tmp_path):
    (tmp_path / "list").write_bytes(b"\xef\xbb\xbfcaf\xe9")
    assert RawFolder.from_uri(tmp_path).read_text("list") == "caf\udce9"


def test_unknown_scheme_is_refused():
    with pytest.raises(StoreError, match="unknown scheme 'ftp'"):
        RawFolder.from_uri("ftp://host/data")


@pytest.mark.objectstore
class TestRemote:
    def test_dataset_in_an_object_store_equals_the_local_one(self, cvusa, s3_uri):
        (cvusa / "bingmap/19/0000001.jpg").write_bytes(b"")
        (cvusa / "streetview/panos/0000002.jpg").unlink()
        local, remote = open_source(cvusa), open_source(upload(cvusa, s3_uri))
        assert remote.layout == "cvusa"
        assert remote.problems == local.problems
        assert [(p.key, p.split, p.ground, p.aerial, p.location, p.ground_status.num_bytes) for p in remote.pairs] == [
            (p.key, p.split, p.ground, p.aerial, p.location, p.ground_status.num_bytes) for p in local.pairs
        ]
        pair = remote.pairs[0]
        assert remote.root.read_bytes(pair.ground) == local.root.read_bytes(pair.ground)

    def test_answers_are_those_of_a_local_folder(self, cvusa, s3_uri):
        local, remote = RawFolder.from_uri(cvusa), RawFolder.from_uri(upload(cvusa, s3_uri))
        for path in ("", "bingmap", "bingmap/19", "splits", "splits/val-19zl.csv", "nothing", "bing"):
            assert remote.has(path) == local.has(path)
            assert remote.names(path) == local.names(path)
            assert (remote.status(path) is None) == (local.status(path) is None)
        assert remote.read_text("splits/val-19zl.csv") == local.read_text("splits/val-19zl.csv")

    def test_table_in_an_object_store_is_opened_by_its_name(self, tmp_path, s3_uri, make_jpeg):
        (tmp_path / "i.jpg").write_bytes(make_jpeg((20, 20), 0))
        (tmp_path / "list.csv").write_text("key,ground,aerial\na,i.jpg,i.jpg\n")
        assert [pair.key for pair in open_source(f"{upload(tmp_path, s3_uri)}/list.csv").pairs] == ["a"]

    def test_workers_get_the_name_and_not_the_listing(self, cvusa, s3_uri):
        root = RawFolder.from_uri(upload(cvusa, s3_uri))
        names = root.names()
        assert root.__reduce__()[1] == (root.uri,)
        assert copy.copy(root).names() == names

    def test_missing_prefix_is_no_such_folder(self, s3_uri):
        with pytest.raises(DataError, match="no such folder"):
            open_source(f"{s3_uri}/nowhere")

    def test_missing_object_is_one_line(self, s3_uri):
        with pytest.raises(StoreError, match="there is no such file"):
            RawFolder.from_uri(s3_uri).read_bytes("nothing")
