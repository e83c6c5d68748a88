"""Random access gives the original bytes or an error that names the shard; remote shards are copied once, verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cvft.errors import ConfigError, DataError, ShardError
from pipeline.cache import ShardCache
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


def test_used_rows_are_those_of_the_manifest(cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"))
    assert PairDataset(manifest, "val").ground_rows_px == [None] * 5
    for name, rows in (("ground_first_row_px", [14, None] * 8), ("ground_stop_row_px", [42, None] * 8)):
        number = manifest.pairs.column_names.index(name)
        manifest.pairs = manifest.pairs.set_column(number, name, pa.array(rows, pa.int32()))
    assert PairDataset(manifest, "train").ground_rows_px[:3] == [(14, 42), None, (14, 42)]


@pytest.mark.objectstore
class TestRemote:
    def test_shards_are_copied_once_under_their_digest(self, cvusa, tmp_path, s3_uri, make_shards):
        manifest = Manifest.load(make_shards(cvusa, s3_uri).uri)
        cache = ShardCache(tmp_path / "cache")
        expected = raw_bytes(cvusa)
        for _ in range(2):
            dataset = PairDataset(manifest, "train", cache=cache)
            pairs = [tuple(map(bytes, dataset.read(row))) for row in range(11)]
            assert pairs == [expected[key] for key in dataset.keys]
        digests = {shard.blake3 for shard in manifest.shards if "train" in shard.name}
        assert {path.name for path in (tmp_path / "cache").glob("*.*")} == {f"{digest}.tar" for digest in digests}
        assert (cache.stats.num_misses, cache.stats.num_hits) == (3, 3)

    def test_shards_are_fetched_in_the_order_of_their_rows(self, cvusa, tmp_path, s3_uri, make_shards, caplog):
        manifest = make_shards(cvusa, s3_uri, pairs_per_shard=2)
        cache = ShardCache(tmp_path / "cache")
        asked = []
        cache.open_later = lambda store, shard: asked.append(shard.name) or ShardCache.open_later(cache, store, shard)
        dataset = PairDataset(manifest, "train", cache=cache)
        rows = np.array([9, 3, 8, 0, 2, 10])
        dataset.prefetch(rows)
        assert asked == [manifest.shards[number].name for number in (4, 1, 0, 5)]
        for row in range(11):
            dataset.read(row)
        assert len(asked) == 6

    def test_bit_that_flips_in_the_cache_is_mended_from_the_store(self, cvusa, tmp_path, s3_uri, make_shards, caplog):
        manifest = make_shards(cvusa, s3_uri, pairs_per_shard=100)
        cache = ShardCache(tmp_path / "cache")
        expected = raw_bytes(cvusa)
        dataset = PairDataset(manifest, "val", cache=cache)
        dataset.read(0)
        spans = manifest.split("val").to_pylist()
        (copy,) = (tmp_path / "cache").glob("*.tar")
        for row, role in ((2, "aerial"), (3, "ground")):
            flip(copy, spans[row][f"{role}_offset"] + 1000)
        assert {dataset.keys[row]: tuple(map(bytes, dataset.read(row))) for row in range(5)} == {
            key: expected[key] for key in dataset.keys
        }
        assert (cache.stats.num_dropped, cache.stats.num_misses) == (1, 2)
        assert f"{manifest.shards[spans[0]['shard']].name}: its copy in the cache is damaged" in caplog.text

    def test_shard_damaged_in_the_store_as_well_is_named(self, cvusa, tmp_path, s3_uri, make_shards):
        manifest = make_shards(cvusa, s3_uri, pairs_per_shard=100)
        name = manifest.shards[0].name
        store = Store.from_uri(s3_uri)
        dataset = PairDataset(manifest, "train", cache=tmp_path / "cache")
        dataset.read(0)
        position = manifest.split("train").to_pylist()[5]["ground_offset"] + 50
        wrong = bytearray(store.read_bytes(name))
        wrong[position] ^= 1
        store.write_bytes(name, bytes(wrong))
        (copy,) = (tmp_path / "cache").glob("*.tar")
        flip(copy, position)
        dataset.read(4)
        with pytest.raises(ShardError, match=f"{name}: the store's shard is not the one that the manifest describes"):
            dataset.read(5)
        with pytest.raises(ShardError, match=f"{name}: the store's shard is not the one"):
            PairDataset(manifest, "train", cache=tmp_path / "cache").read(0)

    def test_cache_smaller_than_the_split_is_refused(self, cvusa, tmp_path, s3_uri, make_shards):
        manifest = make_shards(cvusa, s3_uri)
        with pytest.raises(ConfigError, match=r"data.cache_gb: 1e-05 GB cannot hold the \S+ GB of shards"):
            PairDataset(manifest, "train", cache=ShardCache(tmp_path / "cache", limit_bytes=10_000))

    def test_sparse_access_reads_single_pairs_and_keeps_nothing(
        self, cvusa, tmp_path, s3_uri, make_shards, monkeypatch
    ):
        manifest = make_shards(cvusa, s3_uri, pairs_per_shard=100)
        expected = raw_bytes(cvusa)
        asked = []
        read_range = Store.read_range
        monkeypatch.setattr(Store, "read_range", lambda *args: asked.append(args[-1]) or read_range(*args))
        dataset = PairDataset(manifest, "val", cache=tmp_path / "cache", access="sparse")
        dataset.prefetch()
        for row in (3, 1):
            assert tuple(map(bytes, dataset.read(row))) == expected[dataset.keys[row]]
            assert asked[-1] < sum(map(len, dataset.read(row))) + 3 * 512
        assert len(asked) == 4
        assert not (tmp_path / "cache").exists()

    def test_bit_flipped_in_the_store_is_found_by_sparse_access(self, cvusa, s3_uri, make_shards):
        manifest = make_shards(cvusa, s3_uri, pairs_per_shard=100)
        row = manifest.split("val").to_pylist()[1]
        store, name = Store.from_uri(s3_uri), manifest.shards[row["shard"]].name
        wrong = bytearray(store.read_bytes(name))
        wrong[row["ground_offset"] + 9] ^= 1
        store.write_bytes(name, bytes(wrong))
        dataset = PairDataset(manifest, "val", access="sparse")
        dataset.read(0)
        with pytest.raises(ShardError, match=f"{name}, key {row['key']}: the ground image's bytes have changed"):
            dataset.read(1)
