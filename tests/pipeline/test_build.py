"""Sharding on Ray equals sharding without it, goes on where it stopped, and leaves nothing out in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvft.config import PreprocessConfig
from cvft.errors import ConfigError, DataError, StoreError
from pipeline.build import ShardResult, build_shards
from pipeline.dataset import PairDataset
from pipeline.loader import Loader
from pipeline.manifest import Manifest
from pipeline.storage import Store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def build(root: Path, store: Path | str, **options: object) -> ShardResult:
    return build_shards(root, str(store), **({"pairs_per_shard": 4} | options))


def test_ray_gives_the_manifest_that_plain_writing_gives(cvusa, tmp_path, make_shards):
    result = build(cvusa, tmp_path / "ray", window=2)
    plain = make_shards(cvusa, str(tmp_path / "plain"))
    assert result.digest == plain.digest
    names = [shard.name for shard in plain.shards]
    assert [(tmp_path / "ray" / name).read_bytes() for name in names] == [
        (tmp_path / "plain" / name).read_bytes() for name in names
    ]
    assert (result.num_pairs, result.num_shards, result.num_written, result.layout) == (16, 5, 5, "cvusa")
    assert result.num_bytes == sum((tmp_path / "ray" / name).stat().st_size for name in names)
    assert Manifest.load(result.manifest).digest == result.digest


def test_only_missing_shards_are_written_and_the_manifest_is_the_same(cvusa, tmp_path):
    first = build(cvusa, tmp_path / "store")
    assert build(cvusa, tmp_path / "store").num_written == 0
    store = Store.from_uri(tmp_path / "store")
    shards = [path for path in store.list("shards") if path.endswith(".tar")]
    store.local_path(shards[0]).unlink()  # lost
    store.local_path(shards[1].replace(".tar", ".json")).unlink()  # written, but not finished
    store.local_path(shards[2]).write_bytes(b"cut")
    again = build(cvusa, tmp_path / "store")
    assert again.num_written == 3
    assert again.digest == first.digest


def test_shard_with_a_damaged_sidecar_is_written_again_and_said(cvusa, tmp_path, caplog):
    first = build(cvusa, tmp_path / "store")
    sidecars = sorted((tmp_path / "store").rglob("val-*.json"))
    sidecars[0].write_bytes(sidecars[0].read_bytes()[:-20])
    sidecars[1].write_bytes(b"{}")
    again = build(cvusa, tmp_path / "store")
    assert (again.num_written, again.digest) == (2, first.digest)
    assert [record.getMessage().count("is written again") for record in caplog.records] == [1, 1]
    assert "val-00000.json: is damaged" in caplog.text


@pytest.mark.parametrize(
    "option", [{"pairs_per_shard": 0}, {"pairs_per_shard": -1}, {"seed": -1}, {"seed": 2**64}, {"window": 0}]
)
def test_number_out_of_range_is_refused_before_any_work(option, cvusa, tmp_path):
    ((name, value),) = option.items()
    with pytest.raises(ConfigError, match=f"^{name}: {value} must"):
        build(cvusa, tmp_path / "store", **option)
    assert not (tmp_path / "store").exists()


def test_changed_image_is_sharded_anew(cvusa, tmp_path, make_jpeg):
    first = build(cvusa, tmp_path / "store")
    (cvusa / "bingmap/19/0000001.jpg").write_bytes(make_jpeg((187, 187), 99))
    second = build(cvusa, tmp_path / "store")
    assert second.digest != first.digest
    keys = Manifest.load(second.manifest).pairs["key"].to_pylist()
    assert sorted(keys) == [f"{number:07d}" for number in range(1, 17)]
    PairDataset(Manifest.load(first.manifest), "train")  # the older manifest's shards are still there


def test_progress_ends_with_all_pairs(cvusa, tmp_path):
    seen = []
    build(cvusa, tmp_path / "store", progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [16] * 5
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (16, 16)


class TestUnusable:
    @pytest.fixture
    def damaged(self, cvusa) -> Path:
        (cvusa / "streetview/panos/0000001.jpg").unlink()
        path = cvusa / "bingmap/19/0000004.jpg"
        path.write_bytes(path.read_bytes()[:-300])
        return cvusa

    def test_missing_file_is_refused_before_any_work(self, damaged, tmp_path):
        with pytest.raises(
            DataError, match=r"missing_ground 1.*streetview/panos/0000001\.jpg.*--skip-unusable"
        ) as error:
            build(damaged, tmp_path / "store")
        assert "\n" not in str(error.value)
        assert Store.from_uri(tmp_path / "store").list() == []

    def test_truncated_image_is_refused_and_no_manifest_published(self, damaged, tmp_path, make_jpeg):
        (damaged / "streetview/panos/0000001.jpg").write_bytes(make_jpeg((56, 308), 1))
        with pytest.raises(DataError, match=r"truncated 1.*bingmap/19/0000004\.jpg.*--skip-unusable"):
            build(damaged, tmp_path / "store")
        assert Store.from_uri(tmp_path / "store").list("manifests") == []

    def test_when_told_they_are_left_out_counted_and_named_in_the_manifest(self, damaged, tmp_path):
        result = build(damaged, tmp_path / "store", skip_unusable=True)
        assert result.num_pairs == 14
        assert {kind: result.problems[kind] for kind in ("missing_ground", "truncated")} == {
            "missing_ground": 1,
            "truncated": 1,
        }
        manifest = Manifest.load(result.manifest)
        assert {(problem.kind, problem.key) for problem in manifest.excluded} == {
            ("missing_ground", "0000001"),
            ("truncated", "0000004"),
        }
        assert {"0000001", "0000004"}.isdisjoint(manifest.pairs["key"].to_pylist())
        assert build(damaged, tmp_path / "store", skip_unusable=True).digest == result.digest

    def test_dataset_without_pairs_is_refused_even_then(self, tmp_path):
        (tmp_path / "pairs.csv").write_text("key,ground,aerial\n")
        with pytest.raises(DataError, match="no pair is listed"):
            build(tmp_path, tmp_path / "store", skip_unusable=True)


def test_store_that_cannot_be_written_is_one_clear_line(cvusa, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot write it") as error:
        build(cvusa, tmp_path / "file")
    assert "\n" not in str(error.value)


@pytest.mark.objectstore
def test_shards_go_to_an_object_store_and_come_back_as_batches(cvusa, tmp_path, s3_uri, make_shards):
    result = build(cvusa, s3_uri)
    assert result.digest == make_shards(cvusa, str(tmp_path / "local")).digest
    assert build(cvusa, s3_uri).num_written == 0
    dataset = PairDataset(Manifest.load(result.manifest), "train", cache=tmp_path / "cache")
    loader = Loader(dataset, preprocess=PreprocessConfig(), batch_size=4)
    assert sorted(row for batch in loader.eval_batches() for row in batch.index[: batch.num_valid].tolist()) == list(
        range(11)
    )
