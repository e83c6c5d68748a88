"""Whatever bit is flipped, whatever file is missing or cut: verify finds it, names it, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from cvft.errors import ConfigError, ShardError, StoreError
from pipeline.manifest import Manifest
from pipeline.plan import document_path
from pipeline.shard_checks import DAMAGE_KINDS, pair_spans
from pipeline.storage import Store
from pipeline.verify import verify

NUM_FLIPS = 40  # of each region


@pytest.fixture
def manifest(tmp_path, make_cvusa, make_shards) -> Manifest:
    """Five pairs in three shards, as `Manifest.load` gives them."""
    raw = make_cvusa(tmp_path / "raw", num_train=3, num_val=2)
    return Manifest.load(make_shards(raw, str(tmp_path / "store"), pairs_per_shard=2).uri)


def file_of(manifest: Manifest, path: str):
    return Store.from_uri(manifest.store_uri).local_path(path)


def flip(path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def regions(manifest: Manifest, number: int) -> dict[str, list[tuple[int, int, str | None]]]:
    """Return the parts of a shard by name, each as first byte, end and the key whose it is."""
    shard = manifest.shards[number]
    rows = [row for row in manifest.pairs.to_pylist() if row["shard"] == number]
    parts: dict[str, list[tuple[int, int, str | None]]] = {"image": [], "header": [], "padding": [], "json": []}
    for span in pair_spans(rows, shard):
        key, row = span.row["key"], span.row
        for role in ("ground", "aerial"):
            start, stop = row[f"{role}_offset"], row[f"{role}_offset"] + row[f"{role}_bytes"]
            parts["header"].append((start - 512, start, key))
            parts["image"].append((start, stop, key))
            parts["padding"].append((stop, stop + -stop % 512, key))
        json_header = stop + -stop % 512
        content = file_of(manifest, shard.name).read_bytes()
        size = int(content[json_header + 124 : json_header + 135], 8)
        json_stop = json_header + 512 + size
        parts["header"].append((json_header, json_header + 512, key))
        parts["json"].append((json_header + 512, json_stop, key))
        parts["padding"].append((json_stop, json_stop + -json_stop % 512, key))
    parts["end"] = [(json_stop + -json_stop % 512, shard.num_bytes, None)]
    assert sum(stop - start for part in parts.values() for start, stop, _ in part) == shard.num_bytes
    return parts


@pytest.mark.parametrize("scheme", ["file", pytest.param("s3", marks=pytest.mark.objectstore)])
def test_sound_shards_have_no_damage(scheme, cvusa, tmp_path, make_shards, request):
    store_uri = str(tmp_path / "store") if scheme == "file" else request.getfixturevalue("s3_uri")
    manifest = Manifest.load(make_shards(cvusa, store_uri).uri)
    seen = []
    for num_sampled, num_read in ((None, 16), (5, 5), (1000, 16), (0, 0)):
        report = verify(manifest, num_sampled=num_sampled, progress=lambda done, total: seen.append((done, total)))
        assert report.damages == []
        assert report.kinds == {}
        assert (report.num_shards, report.num_pairs) == (5, num_read)
        assert seen[-1:] == ([(num_read, num_read)] if num_read else seen[-1:])
    assert verify(manifest).num_bytes == sum(shard.num_bytes for shard in manifest.shards)


@pytest.mark.parametrize("region", ["image", "header", "padding", "json", "end"])
def test_every_flipped_bit_of_a_shard_is_found_and_its_pair_named(manifest, region):
    generator = np.random.default_rng(len(region))
    parts = [part for part in regions(manifest, 0)[region] if part[1] > part[0]]
    path = file_of(manifest, manifest.shards[0].name)
    for _ in range(NUM_FLIPS):
        start, stop, key = parts[generator.integers(len(parts))]
        bit = int(generator.integers(8 * start, 8 * stop))
        flip(path, bit)
        (damage,) = verify(manifest, num_threads=1).damages
        assert damage.path == manifest.shards[0].name
        assert damage.kind in DAMAGE_KINDS
        if region == "image":
            assert (damage.kind, damage.key) == ("wrong_image", key)
        elif key is not None and damage.kind != "wrong_hash":
            assert damage.key == key
        flip(path, bit)
    assert verify(manifest).damages == []


def test_every_flipped_bit_of_a_sidecar_is_found(manifest):
    sidecar = manifest.shards[1].name.replace(".tar", ".json")
    path = file_of(manifest, sidecar)
    for bit in np.random.default_rng(0).integers(0, 8 * path.stat().st_size, 3 * NUM_FLIPS).tolist():
        flip(path, bit)
        (damage,) = verify(manifest, num_sampled=0).damages
        assert (damage.kind, damage.path) == ("bad_sidecar", sidecar)
        flip(path, bit)


def test_every_flipped_bit_of_a_manifest_is_found(manifest):
    path = file_of(manifest, manifest.path)
    num_refused, num_found = 0, 0
    for bit in np.random.default_rng(0).integers(0, 8 * path.stat().st_size, 5 * NUM_FLIPS).tolist():
        flip(path, bit)
        try:
            survivor = Manifest.load(str(path))
        except ShardError as error:
            num_refused += str(path) in str(error)
        else:
            (damage,) = verify(survivor, num_sampled=0).damages
            assert (damage.kind, damage.path, damage.shard) == ("damaged_manifest", manifest.path, None)
            num_found += 1
        flip(path, bit)
    assert num_refused + num_found == 5 * NUM_FLIPS
    assert min(num_refused, num_found) > 0


def test_plan_that_is_missing_or_damaged_is_told(manifest):
    path = file_of(manifest, document_path(manifest.plan))
    flip(path, 8 * 50)
    assert verify(manifest).kinds == {"damaged_plan": 1}
    path.unlink()
    assert verify(manifest).kinds == {"damaged_plan": 1}


def test_many_damages_are_all_named_in_the_manifests_order(manifest):
    shards = [file_of(manifest, shard.name) for shard in manifest.shards]
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].unlink()
    rows = [row for row in manifest.pairs.to_pylist() if row["shard"] == 2]
    for row in rows:
        flip(shards[2], 8 * row["aerial_offset"] + 5)
        flip(shards[2], 8 * row["ground_offset"] - 8 * 100)
    file_of(manifest, manifest.shards[2].name.replace(".tar", ".json")).unlink()
    found = verify(manifest)
    assert [(damage.shard, damage.kind) for damage in found.damages] == [
        (0, "wrong_size"),
        (1, "missing_shard"),
        (2, "missing_sidecar"),
        *[(2, "wrong_image"), (2, "bad_tar")] * len(rows),
    ]
    assert {damage.key for damage in found.damages if damage.key} == {row["key"] for row in rows}
    assert found.num_pairs == len(rows)
    assert found.kinds["wrong_image"] == len(rows)
    for damage in found.damages:
        assert str(damage).startswith(damage.path)
        assert "\n" not in str(damage)


def test_swapped_shards_of_equal_size_are_told(manifest):
    """Each is a sound tar, but not the one of that name."""
    first, second = (file_of(manifest, shard.name) for shard in manifest.shards[:2])
    second.write_bytes(first.read_bytes())
    shards = list(manifest.shards)
    shards[1] = replace(shards[1], num_bytes=first.stat().st_size)
    manifest.shards = tuple(shards)
    kinds = verify(manifest).kinds
    assert kinds.keys() & {"wrong_image", "wrong_index", "bad_tar"}
    assert kinds["bad_sidecar"] == 1


def changed(manifest: Manifest, name: str, change) -> Manifest:
    """Return the manifest with another column, as somebody who forges one would."""
    values = [change(value) for value in manifest.pairs[name].to_pylist()]
    column = pa.array(values, manifest.pairs.schema.field(name).type)
    manifest.pairs = manifest.pairs.set_column(manifest.pairs.schema.get_field_index(name), name, column)
    return manifest


@pytest.mark.parametrize(
    ("name", "change", "kind"),
    [
        ("key", lambda key: f"{key}x", "wrong_index"),
        ("aerial_offset", lambda offset: offset - 512, "wrong_index"),
        ("aerial_bytes", lambda size: size - 1, "wrong_index"),
        ("latitude_deg", lambda degrees: degrees + 1e-9, "wrong_json"),
        ("location_id", lambda location: "x", "wrong_json"),
        ("metadata", lambda _: '{"a":1}', "wrong_json"),
        ("ground_offset", lambda offset: 10**12 - offset, "wrong_image"),
        ("ground_offset", lambda offset: -offset, "wrong_image"),
    ],
)
def test_index_that_disagrees_with_the_headers_is_told(manifest, name, change, kind):
    damages = verify(changed(manifest, name, change)).damages
    assert kind in {damage.kind for damage in damages}


class TestSample:
    def test_sampled_pairs_are_read_by_range_and_are_the_same_for_a_seed(self, manifest, monkeypatch):
        reads = []
        read_range = Store.read_range
        monkeypatch.setattr(
            Store, "read_range", lambda *arguments: reads.append(arguments[1:3]) or read_range(*arguments)
        )
        chosen = []
        for seed in (0, 0, 1):
            reads.clear()
            assert verify(manifest, num_sampled=2, seed=seed, num_threads=1).num_pairs == 2
            chosen.append(tuple(reads))
        assert [len(part) for part in chosen] == [2, 2, 2]
        assert chosen[0] == chosen[1] != chosen[2]

    def test_flipped_bit_is_found_where_its_pair_is_sampled(self, manifest):
        row = manifest.pairs.to_pylist()[0]
        flip(file_of(manifest, manifest.shards[0].name), 8 * row["ground_offset"] + 100)
        found = {num: verify(manifest, num_sampled=num).kinds for num in (0, 5)}
        assert found == {0: {}, 5: {"wrong_image": 1}}

    @pytest.mark.parametrize("name", ["num_threads", "num_sampled"])
    def test_numbers_out_of_range_are_refused(self, manifest, name):
        with pytest.raises(ConfigError, match=f"{name}: -1"):
            verify(manifest, **{name: -1})


def test_unreadable_shard_is_a_damage_and_the_others_are_still_looked_at(manifest, monkeypatch):
    open_input = Store.open_input

    def refuse(store, path):
        if path == manifest.shards[0].name:
            raise StoreError("a.tar: cannot read it: Input/output error")
        return open_input(store, path)

    monkeypatch.setattr(Store, "open_input", refuse)
    flip(file_of(manifest, manifest.shards[1].name), 8 * 600)
    assert verify(manifest).kinds == {"unreadable": 1, "wrong_image": 1}


def test_json_member_that_is_no_json_is_told(manifest):
    path = file_of(manifest, manifest.shards[0].name)
    start, stop, key = regions(manifest, 0)["json"][0]
    content = bytearray(path.read_bytes())
    for text in (b"[]", b"null", b"{}", b"\xff", json.dumps({"key": key}).encode()):
        path.write_bytes(bytes(content[:start]) + text.ljust(stop - start) + bytes(content[stop:]))
        (damage,) = verify(manifest).damages
        assert (damage.kind, damage.key) == ("wrong_json", key)
