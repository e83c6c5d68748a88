"""Random access gives the original bytes or an error that names the shard; remote shards are copied once, verified."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvft.errors import DataError, ShardError
from pipeline.dataset import PairDataset
from pipeline.manifest import Manifest
from pipeline.sources.detect import open_source
from pipeline.storage import Store


def raw_bytes(root: Path) -> dict[str, tuple[bytes, bytes]]:
    return {
        pair.key: ((root / pair.ground).read_bytes(), (root / pair.aerial).read_bytes())
        for pair in open_source(root).pairs
    }


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_every_pair_reads_as_it_was(cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"))
    expected = raw_bytes(cvusa)
    for split, num_pairs in (("train", 11), ("val", 5)):
        dataset = PairDataset(manifest, split)
        assert len(dataset) == num_pairs
        assert {key: tuple(map(bytes, dataset.read(row))) for row, key in enumerate(dataset.keys)} == {
            key: expected[key] for key in dataset.keys
        }


def test_rows_stand_in_the_manifests_order_with_their_places(cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"))
    dataset = PairDataset(manifest, "val")
    assert dataset.keys == manifest.split("val")["key"].to_pylist()
    assert dataset.location_m.tolist() == manifest.location_m("val").tolist()


def test_flipped_bit_is_found_on_reading_and_named(cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"), pairs_per_shard=100)
    row = manifest.split("val").to_pylist()[2]
    name = manifest.shards[row["shard"]].name
    flip(tmp_path / "store" / name, row["aerial_offset"] + 1000)
    dataset = PairDataset(Manifest.load(manifest.uri), "val")
    dataset.read(1)
    with pytest.raises(ShardError, match=f"{name}, key {row['key']}: the aerial image's bytes have changed"):
        dataset.read(2)


def test_shard_of_another_length_is_refused(cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"))
    path = tmp_path / "store" / manifest.shards[0].name
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ShardError, match="the manifest says"):
        PairDataset(manifest, "train")


def test_missing_shard_is_named(cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"))
    (tmp_path / "store" / manifest.shards[0].name).unlink()
    with pytest.raises(ShardError, match=r"train-00000\.tar: the shard is missing"):
        PairDataset(manifest, "train")


def test_unknown_split_is_refused(cvusa, tmp_path, make_shards):
    with pytest.raises(DataError, match="it has train, val"):
        PairDataset(make_shards(cvusa, str(tmp_path / "store")), "test")


@pytest.mark.objectstore
class TestRemote:
    def test_shards_are_copied_once_under_their_digest(self, cvusa, tmp_path, s3_uri, make_shards):
        manifest = Manifest.load(make_shards(cvusa, s3_uri).uri)
        cache = tmp_path / "cache"
        expected = raw_bytes(cvusa)
        dataset = PairDataset(manifest, "train", cache=cache)
        assert [tuple(map(bytes, dataset.read(row))) for row in range(11)] == [expected[key] for key in dataset.keys]
        digests = {shard.blake3 for shard in manifest.shards if "train" in shard.name}
        assert {path.name for path in cache.iterdir()} == {f"{digest}.tar" for digest in digests}
        times = [path.stat().st_mtime_ns for path in sorted(cache.iterdir())]
        PairDataset(manifest, "train", cache=cache)
        assert [path.stat().st_mtime_ns for path in sorted(cache.iterdir())] == times

    def test_shard_that_is_not_the_manifests_never_enters_the_cache(self, cvusa, tmp_path, s3_uri, make_shards):
        manifest = make_shards(cvusa, s3_uri, pairs_per_shard=100)
        other = make_shards(cvusa, str(tmp_path / "store"), pairs_per_shard=100)
        wrong = bytearray((tmp_path / "store" / other.shards[0].name).read_bytes())
        wrong[5000] ^= 1
        from_store = Manifest.load(manifest.uri)
        Store.from_uri(s3_uri).write_bytes(from_store.shards[0].name, bytes(wrong))
        with pytest.raises(ShardError, match="its blake3 is not the manifest's"):
            PairDataset(from_store, "train", cache=tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []
