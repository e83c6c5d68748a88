"""A shard is a plain USTAR tar of original bytes, the same for the same input, and webdataset reads it."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import tarfile
from pathlib import Path

import cv2
import pytest
import simplejpeg
import webdataset as wds
import xxhash
from blake3 import blake3
from PIL import Image

from cvft.errors import ShardError
from pipeline.manifest import ShardInfo
from pipeline.plan import Cut, make_plan
from pipeline.profile import preresized
from pipeline.shards import ShardSpec, read_entry, write_shard
from pipeline.sources.detect import open_source
from pipeline.storage import Store


def specs_of(root: Path, **options: int) -> list[ShardSpec]:
    cut = Cut(**({"pairs_per_shard": 100} | options))
    return list(make_plan(open_source(root), cut, check_images=True).specs)


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
    assert [entry.columns for entry in first] == [entry.columns for entry in second]


def test_offsets_and_digests_lead_to_the_original_bytes(cvusa, store):
    spec = specs_of(cvusa)[0]
    entry = write_shard(spec, store)
    content = store.read_bytes(spec.name)
    for number, pair in enumerate(spec.pairs):
        row = {name: values[number] for name, values in entry.columns.items()}
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
    assert "0000003" not in entry.columns["key"]
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


class TestPreresized:
    PROFILE = preresized((14, 77), (16, 16))

    @pytest.fixture
    def spec(self, cvusa) -> ShardSpec:
        return make_plan(open_source(cvusa), Cut(pairs_per_shard=100, profile=self.PROFILE), check_images=True).specs[0]

    def row(self, entry, number: int) -> dict[str, object]:
        return {name: values[number] for name, values in entry.columns.items()}

    def test_images_are_what_the_exact_decoder_gives_at_quality_95_without_subsampling(self, cvusa, spec, store):
        entry = write_shard(spec, store)
        content = store.read_bytes(spec.name)
        row = self.row(entry, 3)
        pixels = cv2.resize(
            cv2.cvtColor(cv2.imread(str(cvusa / spec.pairs[3].ground)), cv2.COLOR_BGR2RGB),
            (77, 14),
            interpolation=cv2.INTER_AREA,
        )
        start = row["ground_offset"]
        data = content[start : start + row["ground_bytes"]]
        assert data == simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="444")
        assert (row["ground_height_px"], row["ground_width_px"]) == (14, 77)
        assert row["ground_xxh3_128"] == xxhash.xxh3_128_hexdigest(data)
        assert simplejpeg.decode_jpeg_header(data)[3] == "444"

    def test_hashes_of_the_originals_are_kept_and_the_json_says_what_was_done(self, cvusa, spec, store):
        row = self.row(write_shard(spec, store), 0)
        for role in ("ground", "aerial"):
            original = (cvusa / getattr(spec.pairs[0], role)).read_bytes()
            assert row[f"{role}_source_xxh3_128"] == xxhash.xxh3_128_hexdigest(original)
        with tarfile.open(store.local_path(spec.name)) as tar:
            content = json.loads(tar.extractfile(f"{spec.pairs[0].key}.json").read())
        assert content["profile"] == self.PROFILE.plain()

    def test_used_rows_are_cut_out_once_and_for_all(self, cvusa, spec, store):
        whole = self.row(write_shard(spec, store), 0)
        pair = dataclasses.replace(spec.pairs[0], ground_rows_px=(14, 42))
        cropped = self.row(write_shard(dataclasses.replace(spec, pairs=[pair]), store), 0)
        pixels = cv2.cvtColor(cv2.imread(str(cvusa / pair.ground)), cv2.COLOR_BGR2RGB)[14:42]
        expected = cv2.resize(pixels, (77, 14), interpolation=cv2.INTER_AREA)
        encoded = simplejpeg.encode_jpeg(expected, quality=95, colorsubsampling="444")
        assert cropped["ground_xxh3_128"] == xxhash.xxh3_128_hexdigest(encoded) != whole["ground_xxh3_128"]
        assert cropped["ground_first_row_px"] is None

    def test_same_files_give_the_same_bytes(self, spec, store):
        assert write_shard(spec, store) == write_shard(spec, store)

    def test_damaged_image_is_left_out_without_the_check_as_well(self, cvusa, spec, store):
        path = cvusa / spec.pairs[2].aerial
        path.write_bytes(path.read_bytes()[:-300])
        entry = write_shard(dataclasses.replace(spec, check_images=False), store)
        assert spec.pairs[2].key not in entry.columns["key"]
        (problem,) = (problem for problem in entry.problems if problem.is_unusable)
        assert (problem.kind, problem.key, problem.path) == ("truncated", spec.pairs[2].key, spec.pairs[2].aerial)


def test_used_rows_and_metadata_stand_in_the_row_and_in_the_json(cvusa, store):
    (spec, _) = specs_of(cvusa)
    metadata = {"offset_px": [1.5, -2], "name": "ä"}
    pair = dataclasses.replace(spec.pairs[0], ground_rows_px=(10, 20), metadata=metadata)
    entry = write_shard(dataclasses.replace(spec, pairs=[pair]), store)
    columns = {name: values[0] for name, values in entry.columns.items()}
    assert (columns["ground_first_row_px"], columns["ground_stop_row_px"]) == (10, 20)
    assert columns["metadata"] == '{"name":"\\u00e4","offset_px":[1.5,-2]}'
    assert columns["ground_source_xxh3_128"] is None
    with tarfile.open(store.local_path(spec.name)) as tar:
        content = json.loads(tar.extractfile(f"{pair.key}.json").read())
    assert (content["metadata"], content["ground_rows_px"]) == (metadata, [10, 20])
