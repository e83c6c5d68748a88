"""A damaged file comes back to the bit where the raw data is what it was; else it stays, and the reason is told."""

from __future__ import annotations

import shutil

import pytest

from cvft.errors import DataError
from pipeline.manifest import Manifest
from pipeline.profile import preresized
from pipeline.repair import repair
from pipeline.shards import sidecar_path
from pipeline.storage import Store
from pipeline.verify import verify


@pytest.fixture
def raw(tmp_path, make_cvusa):
    return make_cvusa(tmp_path / "raw", num_train=3, num_val=2)


def content(manifest: Manifest) -> dict[str, bytes]:
    """Return the shards and the manifest; sidecars also tell when raw files were written."""
    store = Store.from_uri(manifest.store_uri)
    paths = [manifest.path, *(shard.name for shard in manifest.shards)]
    return {path: store.read_bytes(path) for path in paths}


def flip(manifest: Manifest, path: str, position: int) -> None:
    store = Store.from_uri(manifest.store_uri)
    data = bytearray(store.read_bytes(path))
    data[position] ^= 4
    store.write_bytes(path, bytes(data))


def delete(manifest: Manifest, path: str, _: int) -> None:
    Store.from_uri(manifest.store_uri).delete(path)


@pytest.mark.parametrize("scheme", ["file", pytest.param("s3", marks=pytest.mark.objectstore)])
@pytest.mark.parametrize("profile", ["original", "preresized"])
def test_damaged_and_missing_files_come_back_to_the_bit(scheme, profile, raw, tmp_path, make_shards, request):
    store_uri = str(tmp_path / "store") if scheme == "file" else request.getfixturevalue("s3_uri")
    options = {} if profile == "original" else {"profile": preresized((28, 154), (64, 64))}
    manifest = Manifest.load(make_shards(raw, store_uri, pairs_per_shard=2, **options).uri)
    whole = content(manifest)
    first, second, third = (shard.name for shard in manifest.shards)
    flip(manifest, first, 700)
    delete(manifest, second, 0)
    delete(manifest, sidecar_path(second), 0)
    flip(manifest, sidecar_path(third), 70)
    before = Store.from_uri(store_uri).status(third)
    damages = verify(manifest).damages
    seen = []
    done = repair(manifest, damages, raw, progress=lambda number, total: seen.append((number, total)))
    assert set(done.repaired) == {first, second, sidecar_path(second), sidecar_path(third)}
    assert done.failed == {}
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert content(manifest) == whole
    assert verify(manifest).damages == []
    assert Store.from_uri(store_uri).status(third) == before  # its sidecar alone was damaged


def test_manifest_whose_unused_bytes_are_damaged_is_written_again(raw, tmp_path, make_shards):
    manifest = make_shards(raw, str(tmp_path / "store"))
    whole = content(manifest)
    position = whole[manifest.path].rindex(b"parquet-cpp")  # the writer's name
    flip(manifest, manifest.path, position)
    manifest = Manifest.load(manifest.uri)
    damages = verify(manifest).damages
    assert repair(manifest, damages, tmp_path / "nowhere").repaired == [manifest.path]
    assert content(manifest) == whole


def change_image(raw, key):
    path = raw / f"bingmap/19/{key}.jpg"
    path.write_bytes(path.read_bytes() + b"\0")


def lose_image(raw, key):
    (raw / f"streetview/panos/{key}.jpg").unlink()


def break_image(raw, key):
    (raw / f"streetview/panos/{key}.jpg").write_bytes(b"no picture")


def move_pair(raw, key):
    path = raw / "split_locations/all.csv"
    lines = path.read_text().splitlines()
    lines[int(key) - 1] = "0,0,1.5,2.5,3.5"
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_image, "the raw data has changed: key {key} has another aerial_bytes"),
        (lose_image, "the raw data lacks 1 of its 2 pairs, first {key}"),
        (break_image, "the raw data has changed: streetview/panos/{key}.jpg: unreadable"),
        (move_pair, "the raw data has changed: key {key} has another latitude_deg"),
    ],
)
def test_changed_raw_data_leaves_the_damaged_shard_and_tells_why(change, words, raw, tmp_path, make_shards):
    manifest = Manifest.load(make_shards(raw, str(tmp_path / "store"), pairs_per_shard=2).uri)
    first, second = (shard.name for shard in manifest.shards[:2])
    flip(manifest, first, 700)
    flip(manifest, second, 700)
    damaged = content(manifest)
    key = next(row["key"] for row in manifest.pairs.to_pylist() if row["shard"] == 0)
    change(raw, key)
    done = repair(manifest, verify(manifest).damages, raw)
    assert done.repaired == [second]
    assert done.failed.keys() == {first}
    assert words.format(key=key) in done.failed[first]
    assert content(manifest)[first] == damaged[first]
    assert [damage.shard for damage in verify(manifest).damages] == [0]


def test_shards_of_a_dataset_with_pairs_left_out_come_back(raw, tmp_path, make_shards):
    break_image(raw, "0000002")
    manifest = make_shards(raw, str(tmp_path / "store"), pairs_per_shard=2, skip_unusable=True)
    assert len(manifest.excluded) == 1
    whole = content(manifest)
    for shard in manifest.shards:
        flip(manifest, shard.name, 700)
    assert len(repair(manifest, verify(manifest).damages, raw).repaired) == len(manifest.shards)
    assert content(manifest) == whole


def test_raw_data_that_is_not_there_is_an_error(raw, tmp_path, make_shards):
    manifest = make_shards(raw, str(tmp_path / "store"))
    flip(manifest, manifest.shards[0].name, 700)
    shutil.rmtree(raw)
    with pytest.raises(DataError):
        repair(manifest, verify(manifest).damages, raw)


def test_nothing_is_left_beside_the_store(raw, tmp_path, make_shards, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    manifest = make_shards(raw, str(tmp_path / "store"))
    flip(manifest, manifest.shards[0].name, 700)
    repair(manifest, verify(manifest).damages, raw)
    assert list((tmp_path / "temporary").iterdir()) == []
