"""A shard is a plain USTAR tar of original bytes, the same for the same input, and webdataset reads it."""

from __future__ import annotations

import gc
import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from blake3 import blake3
from PIL import Image

from cvft.errors import ShardError
from pipeline.build import plan_fingerprint, plan_shards
from pipeline.manifest import ShardInfo
from pipeline.shards import ShardSpec, read_entry, write_shard
from pipeline.sources.detect import open_source
from pipeline.storage import Store


def specs_of(root: Path, **options: int) -> list[ShardSpec]:
    options = {"pairs_per_shard": 100, "seed": 0} | options
    scan = open_source(root)
    return plan_shards(scan, plan_fingerprint(scan.pairs, **options), check_images=True, **options)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.from_uri(tmp_path / "store")


def test_members_are_contiguous_reproducible_and_in_order(cvusa, store):
    spec = specs_of(cvusa)[0]
    write_shard(spec, store)
    with tarfile.open(store.local_path(spec.name)) as tar:
        members = tar.getmembers()
    expected = [f"{pair.key}.{part}" for pair in spec.pairs for part in ("ground.jpg", "aerial.jpg", "json")]
    assert [member.name for member in members] == expected
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert store.read_bytes(spec.name)[257:265] == b"ustar\x0000"


def test_bytes_equal_those_of_the_tarfile_module(cvusa, store, tmp_path):
    spec = specs_of(cvusa)[0]
    write_shard(spec, store)
    content = store.read_bytes(spec.name)
    with (
        tarfile.open(store.local_path(spec.name)) as tar,
        tarfile.open(tmp_path / "oracle.tar", "w", format=tarfile.USTAR_FORMAT) as oracle,
    ):
        for member in tar.getmembers():
            info = tarfile.TarInfo(member.name)
            info.size = member.size
            oracle.addfile(info, tar.extractfile(member))
    assert content == (tmp_path / "oracle.tar").read_bytes()


def test_same_input_gives_the_same_bytes_wherever_and_whenever(make_cvusa, store, tmp_path):
    first = [write_shard(spec, store) for spec in specs_of(make_cvusa(tmp_path / "a", num_train=5, num_val=2))]
    other = make_cvusa(tmp_path / "b", num_train=5, num_val=2)
    for path in other.rglob("*.jpg"):
        os.utime(path, (1, 1))
    second = [write_shard(spec, Store.from_uri(tmp_path / "other")) for spec in specs_of(other)]
    assert [entry.info for entry in first] == [entry.info for entry in second]
    assert [entry.rows for entry in first] == [entry.rows for entry in second]


def test_offsets_and_digests_lead_to_the_original_bytes(cvusa, store):
    spec = specs_of(cvusa)[0]
    entry = write_shard(spec, store)
    content = store.read_bytes(spec.name)
    for pair, row in zip(spec.pairs, entry.rows, strict=True):
        for role, path in (("ground", pair.ground), ("aerial", pair.aerial)):
            start = row[f"{role}_offset"]
            assert content[start : start + row[f"{role}_bytes"]] == (cvusa / path).read_bytes()
    assert entry.info == ShardInfo(
        name=spec.name, num_bytes=len(content), blake3=blake3(content).hexdigest(), num_pairs=11
    )


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its files to the collector
def test_plain_webdataset_reads_every_pair(cvusa, store):
    specs = specs_of(cvusa, pairs_per_shard=4)
    for spec in specs:
        write_shard(spec, store)
    urls = [str(store.local_path(spec.name)) for spec in specs]
    samples = {sample["__key__"]: sample for sample in wds.WebDataset(urls, shardshuffle=False)}
    pairs = open_source(cvusa).pairs
    gc.collect()
    assert set(samples) == {pair.key for pair in pairs}
    for pair in pairs:
        sample = samples[pair.key]
        assert sample["ground.jpg"] == (cvusa / pair.ground).read_bytes()
        assert sample["aerial.jpg"] == (cvusa / pair.aerial).read_bytes()
        content = json.loads(sample["json"])
        assert (content["key"], content["split"]) == (pair.key, pair.split)
        assert content["latitude_deg"] == pair.location.latitude_deg


def test_png_keeps_its_bytes_and_gets_its_own_ending(cvusa, store):
    path = cvusa / "bingmap/19/0000003.jpg"
    with Image.open(path) as image:
        image.load()
    image.save(path, "PNG")
    spec = specs_of(cvusa)[0]
    entry = write_shard(spec, store)
    with tarfile.open(store.local_path(spec.name)) as tar:
        assert tar.extractfile("0000003.aerial.png").read() == path.read_bytes()
    assert ("not_jpeg", "0000003") in {(problem.kind, problem.key) for problem in entry.problems}


def test_unusable_pair_is_left_out_and_named(cvusa, store):
    (cvusa / "bingmap/19/0000003.jpg").write_bytes((cvusa / "bingmap/19/0000003.jpg").read_bytes()[:-100])
    entry = write_shard(specs_of(cvusa)[0], store)
    assert "0000003" not in {row["key"] for row in entry.rows}
    assert entry.info.num_pairs == 10
    (problem,) = (problem for problem in entry.problems if problem.is_unusable)
    assert (problem.kind, problem.key, problem.path) == ("truncated", "0000003", "bingmap/19/0000003.jpg")


def test_sidecar_says_what_was_written(cvusa, store):
    spec = specs_of(cvusa)[0]
    entry = write_shard(spec, store)
    assert read_entry(store, spec.sidecar) == entry
    assert entry.fingerprint == spec.fingerprint()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b"{}", b'{"info": {"name": "a"}}'])
def test_damaged_sidecar_is_told(content, store):
    store.write_bytes("a.json", content)
    with pytest.raises(ShardError, match=r"a\.json: is damaged .*; delete it and shard again"):
        read_entry(store, "a.json")


def test_longest_key_fits_into_a_ustar_name(tmp_path, store, make_jpeg, make_table):
    key = "k" * 89
    (tmp_path / "i.jpg").write_bytes(make_jpeg((20, 20), 0))
    make_table(tmp_path / "pairs.csv", [{"key": key, "ground": "i.jpg", "aerial": "i.jpg"}])
    (spec,) = specs_of(tmp_path)
    write_shard(spec, store)
    with tarfile.open(store.local_path(spec.name)) as tar:
        assert tar.getnames()[1] == f"{key}.aerial.jpg"


class TestPlan:
    def test_every_pair_is_in_one_shard_of_its_split(self, cvusa):
        specs = specs_of(cvusa, pairs_per_shard=4)
        assert [len(spec.pairs) for spec in specs] == [4, 4, 3, 4, 1]
        assert [spec.name.rpartition("/")[2] for spec in specs] == [
            "train-00000.tar",
            "train-00001.tar",
            "train-00002.tar",
            "val-00000.tar",
            "val-00001.tar",
        ]
        keys = sorted(pair.key for spec in specs for pair in spec.pairs)
        assert keys == sorted(pair.key for pair in open_source(cvusa).pairs)

    def test_pairs_are_mixed_by_the_seed_and_not_by_the_lists_order(self, cvusa):
        before = specs_of(cvusa)
        path = cvusa / "splits/train-19zl.csv"
        path.write_text("\n".join(reversed(path.read_text().splitlines())))
        assert [spec.pairs for spec in specs_of(cvusa)] == [spec.pairs for spec in before]
        keys = [pair.key for pair in before[0].pairs]
        assert keys != sorted(keys)
        assert keys != [pair.key for pair in specs_of(cvusa, seed=1)[0].pairs]

    def test_other_plans_get_other_folders(self, cvusa):
        names = {specs_of(cvusa, **options)[0].name for options in ({}, {"seed": 1}, {"pairs_per_shard": 9})}
        assert len(names) == 3
        (cvusa / "bingmap/19/0000001.jpg").write_bytes(b"changed")
        assert specs_of(cvusa)[0].name not in names
