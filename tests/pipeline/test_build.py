"""Sharding on Ray equals sharding without it, goes on where it stopped, and leaves nothing out in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvft.config import PreprocessConfig
from cvft.errors import ConfigError, DataError, StoreError
from pipeline.build import BuildOptions, ShardResult, build_shards
from pipeline.dataset import PairDataset
from pipeline.loader import Loader
from pipeline.manifest import Manifest
from pipeline.plan import Cut
from pipeline.ray_tasks import OnRay
from pipeline.runner import Here
from pipeline.storage import Store


def build(root: Path, store: Path | str, *, runner: Here | OnRay | None = None, **options: object) -> ShardResult:
    progress = options.pop("progress", None)
    chosen = BuildOptions(**({"cut": Cut(pairs_per_shard=4)} | options))
    return build_shards(root, str(store), chosen, runner=runner or Here(), progress=progress)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_gives_the_manifest_that_plain_writing_gives(cvusa, tmp_path, make_shards):
    result = build(cvusa, tmp_path / "ray", runner=OnRay(window=2))
    plain = make_shards(cvusa, str(tmp_path / "plain"))
    assert result.digest == plain.digest
    names = [shard.name for shard in plain.shards]
    assert [(tmp_path / "ray" / name).read_bytes() for name in names] == [
        (tmp_path / "plain" / name).read_bytes() for name in names
    ]
    assert (result.num_pairs, result.num_shards, result.num_written, result.layout) == (16, 5, 5, "cvusa")
    assert (result.generation, result.num_retries) == (1, 0)
    assert result.num_bytes == sum((tmp_path / "ray" / name).stat().st_size for name in names)
    assert Manifest.load(result.manifest).digest == Manifest.load(str(tmp_path / "ray")).digest == result.digest


def test_only_missing_shards_are_written_and_the_manifest_is_the_same(cvusa, tmp_path):
    first = build(cvusa, tmp_path / "store")
    (tmp_path / "store/dataset.json").unlink()  # as if killed before the end
    store = Store.from_uri(tmp_path / "store")
    shards = [path for path in store.list("shards") if path.endswith(".tar")]
    store.local_path(shards[0]).unlink()  # lost
    store.local_path(shards[1].replace(".tar", ".json")).unlink()  # written, but not finished
    store.local_path(shards[2]).write_bytes(b"cut")
    again = build(cvusa, tmp_path / "store")
    assert again.num_written == 3
    assert again.digest == first.digest
    assert build(cvusa, tmp_path / "store").num_written == 0


def test_shard_with_a_damaged_sidecar_is_written_again_and_said(cvusa, tmp_path, caplog):
    first = build(cvusa, tmp_path / "store")
    (tmp_path / "store/dataset.json").unlink()
    sidecars = sorted((tmp_path / "store").rglob("val-*.json"))
    sidecars[0].write_bytes(sidecars[0].read_bytes()[:-20])
    sidecars[1].write_bytes(b"{}")
    again = build(cvusa, tmp_path / "store")
    assert (again.num_written, again.digest) == (2, first.digest)
    assert [record.getMessage().count("is written again") for record in caplog.records] == [1, 1]
    assert "val-00000.json: is damaged" in caplog.text


def test_job_killed_between_manifest_and_pointer_only_moves_the_pointer(cvusa, tmp_path):
    first = build(cvusa, tmp_path / "store")
    for name in ("dataset.json", f"stamps/{first.digest[:16]}.parquet"):
        (tmp_path / "store" / name).unlink()
    again = build(cvusa, tmp_path / "store")
    assert (again.num_written, again.digest, again.generation) == (0, first.digest, 1)


def test_window_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"^window: 0 must"):
        OnRay(window=0)


def test_progress_ends_with_all_pairs_and_tells_what_was_found(cvusa, tmp_path):
    seen = []
    result = build(cvusa, tmp_path / "store", progress=seen.append)
    assert {now.num_pairs for now in seen} == {16}
    assert [now.num_pairs_done for now in seen] == sorted(now.num_pairs_done for now in seen)
    last = seen[-1]
    assert (last.num_pairs_done, last.num_shards_done, last.num_shards) == (16, 5, 5)
    assert (last.num_bytes_written, last.num_pairs_found) == (result.num_bytes, 0)
    (tmp_path / "store/dataset.json").unlink()
    next((tmp_path / "store").rglob("train-00000.tar")).unlink()
    seen.clear()
    build(cvusa, tmp_path / "store", progress=seen.append)
    assert (seen[0].num_pairs_done, seen[-1].num_pairs_found, seen[-1].num_pairs_done) == (12, 12, 16)


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
        (damaged / "bingmap/19/0000004.jpg").write_bytes(make_jpeg((187, 187), 7))
        assert build(damaged, tmp_path / "store").num_pairs == 16  # mended, it goes on

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
        again = build(damaged, tmp_path / "store", skip_unusable=True)
        assert (again.digest, again.num_written, again.generation) == (result.digest, 0, 1)

    def test_restart_keeps_shards_that_lack_pairs_when_told_to_leave_them_out(self, damaged, tmp_path):
        result = build(damaged, tmp_path / "store", skip_unusable=True)
        (tmp_path / "store/dataset.json").unlink()
        again = build(damaged, tmp_path / "store", skip_unusable=True)
        assert (again.num_written, again.digest) == (0, result.digest)

    def test_without_stamps_a_pair_that_stays_unusable_changes_nothing(self, damaged, tmp_path):
        result = build(damaged, tmp_path / "store", skip_unusable=True)
        next((tmp_path / "store/stamps").iterdir()).unlink()
        again = build(damaged, tmp_path / "store", skip_unusable=True)
        assert (again.digest, again.generation) == (result.digest, 1)

    def test_mended_pair_comes_back_as_a_new_one(self, damaged, tmp_path, make_jpeg):
        build(damaged, tmp_path / "store", skip_unusable=True)
        (damaged / "bingmap/19/0000004.jpg").write_bytes(make_jpeg((187, 187), 7))
        again = build(damaged, tmp_path / "store", skip_unusable=True)
        assert dict(again.changes) == {"kept": 14, "new": 1, "rewritten": 0, "dropped": 0}
        assert [problem.kind for problem in again.excluded] == ["missing_ground"]

    def test_leaving_them_out_must_be_said_each_time(self, damaged, tmp_path):
        build(damaged, tmp_path / "store", skip_unusable=True)
        with pytest.raises(DataError, match="missing_ground 1"):
            build(damaged, tmp_path / "store")

    def test_dataset_without_pairs_is_refused_even_then(self, tmp_path):
        (tmp_path / "pairs.csv").write_text("key,ground,aerial\n")
        with pytest.raises(DataError, match="no pair is listed"):
            build(tmp_path, tmp_path / "store", skip_unusable=True)


class TestExclusionList:
    def test_listed_pairs_are_left_out_counted_and_named(self, cvusa, tmp_path):
        (tmp_path / "list").write_text("# made by hand\n0000002  # leak: of train 0000009\n\n0000003\n")
        result = build(cvusa, tmp_path / "store", exclude=tmp_path / "list")
        assert (result.num_pairs, result.problems["excluded_by_list"]) == (14, 2)
        excluded = Manifest.load(result.manifest).excluded
        assert [(problem.kind, problem.key) for problem in excluded] == [
            ("excluded_by_list", "0000002"),
            ("excluded_by_list", "0000003"),
        ]
        assert excluded[0].detail == "leak: of train 0000009"
        assert build(cvusa, tmp_path / "store", exclude=tmp_path / "list").digest == result.digest

    def test_unusable_pairs_on_the_list_need_no_other_permission(self, cvusa, tmp_path):
        path = cvusa / "bingmap/19/0000004.jpg"
        path.write_bytes(path.read_bytes()[:-300])
        (tmp_path / "list").write_text("0000004  # truncated: Premature end of JPEG file\n")
        assert build(cvusa, tmp_path / "store", exclude=tmp_path / "list").num_pairs == 15

    def test_missing_pairs_on_the_list_need_no_other_permission(self, cvusa, tmp_path):
        (cvusa / "bingmap/19/0000004.jpg").unlink()
        (tmp_path / "list").write_text("0000004  # missing_aerial: no such file\n")
        result = build(cvusa, tmp_path / "store", exclude=tmp_path / "list")
        assert result.num_pairs == 15
        assert [problem.key for problem in result.excluded] == ["0000004"]

    def test_unknown_key_is_refused(self, cvusa, tmp_path):
        (tmp_path / "list").write_text("0000002\nnobody\n")
        with pytest.raises(DataError, match=r"list: lists key 'nobody', which the raw data does not have"):
            build(cvusa, tmp_path / "store", exclude=tmp_path / "list")

    def test_list_that_is_missing_or_no_text_is_one_clear_line(self, cvusa, tmp_path):
        with pytest.raises(StoreError, match="no such file"):
            build(cvusa, tmp_path / "store", exclude=tmp_path / "list")
        (tmp_path / "list").write_bytes(b"\xff\xfe")
        with pytest.raises(DataError, match="is no exclusion list"):
            build(cvusa, tmp_path / "store", exclude=tmp_path / "list")


def test_store_that_cannot_be_written_is_one_clear_line(cvusa, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"cannot .* it") as error:
        build(cvusa, tmp_path / "file")
    assert "\n" not in str(error.value)


@pytest.mark.ray
@pytest.mark.objectstore
@pytest.mark.usefixtures("ray_cluster")
def test_shards_go_to_an_object_store_and_come_back_as_batches(cvusa, tmp_path, s3_uri, make_shards):
    result = build(cvusa, s3_uri, runner=OnRay())
    assert result.digest == make_shards(cvusa, str(tmp_path / "local")).digest
    again = build(cvusa, s3_uri)
    assert (again.num_written, again.digest) == (0, result.digest)
    dataset = PairDataset(Manifest.load(s3_uri), "train", cache=tmp_path / "cache")
    loader = Loader(dataset, preprocess=PreprocessConfig(), batch_size=4)
    assert sorted(row for batch in loader.eval_batches() for row in batch.index[: batch.num_valid].tolist()) == list(
        range(11)
    )
