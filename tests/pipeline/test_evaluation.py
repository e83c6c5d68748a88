"""Queries are told apart by whether they leak and by whom they share their reference with."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from cvft.checkpoint import CheckpointInfo
from cvft.config import BackboneConfig, HeadConfig, ModelConfig, PreprocessConfig
from cvft.model import build_model
from cvft.pair_retrieval import rank_pairs
from cvft.snapshot import take_snapshot
from pipeline.checkpoints import CheckpointFolder, checkpoint_name
from pipeline.evaluation import Queries, Ranks, evaluate_checkpoint
from pipeline.manifest import Manifest
from pipeline.storage import Store


def replace_column(manifest: Manifest, name: str, values: dict[str, str]) -> Manifest:
    """Give some keys of a manifest another value in one column."""
    pairs = manifest.pairs
    changed = [values.get(key, old) for key, old in zip(pairs["key"].to_pylist(), pairs[name].to_pylist(), strict=True)]
    manifest.pairs = pairs.set_column(
        pairs.column_names.index(name), name, pa.array(changed, pairs.schema.field(name).type)
    )
    return manifest


def metrics_of(queries: Queries) -> dict[str, float | None]:
    """What five queries that are all answered rightly give."""
    return Ranks(queries=queries, result=rank_pairs(torch.eye(5), torch.eye(5))).metrics()


@pytest.fixture
def manifest(cvusa, tmp_path, make_shards) -> Manifest:
    return make_shards(cvusa, str(tmp_path / "store"))


def test_deleaked_recall_leaves_leaked_queries_out_and_keeps_all_references(manifest):
    val, train = (manifest.split(name) for name in ("val", "train"))
    leaked_key = val["key"][2].as_py()
    replace_column(manifest, "ground_xxh3_128", {leaked_key: train["ground_xxh3_128"][0].as_py()})
    queries = Queries.of_split(manifest, "val", train_split="train")
    ground = torch.eye(5)
    ground[2] = ground[3]  # the leaked query alone is wrong
    metrics = Ranks(queries=queries, result=rank_pairs(ground, torch.eye(5))).metrics()
    assert queries.location is None
    assert (metrics["recall_at_1"], metrics["recall_at_1_deleaked"]) == (0.8, 1.0)
    assert (metrics["num_leaked_queries"], metrics["num_queries"], metrics["num_references"]) == (1, 5, 5)


def test_without_leaks_both_recalls_are_the_same(manifest):
    metrics = metrics_of(Queries.of_split(manifest, "val", train_split="train"))
    names = ("recall_at_1", "recall_at_5", "recall_at_10", "recall_at_1_percent")
    assert [metrics[f"{name}_deleaked"] for name in names] == [metrics[name] for name in names] == [1.0] * 4
    assert metrics["num_leaked_queries"] == 0


def test_without_a_training_split_deleaked_recall_is_unknown(manifest):
    metrics = metrics_of(Queries.of_split(manifest, "val", train_split="absent"))
    assert metrics["recall_at_1"] == 1.0
    assert metrics["recall_at_1_deleaked"] is None
    assert metrics["num_leaked_queries"] is None


def test_when_every_query_leaks_no_deleaked_recall_is_made_up(manifest):
    train = manifest.split("train")["aerial_xxh3_128"][0].as_py()
    replace_column(manifest, "aerial_xxh3_128", dict.fromkeys(manifest.split("val")["key"].to_pylist(), train))
    metrics = metrics_of(Queries.of_split(manifest, "val", train_split="train"))
    assert (metrics["num_leaked_queries"], metrics["recall_at_1_deleaked"]) == (5, None)


def test_pairs_of_one_location_share_their_reference(manifest):
    first, other = manifest.split("val")["key"].to_pylist()[1::2]
    replace_column(manifest, "location_id", {first: "there", other: "there"})
    queries = Queries.of_split(manifest, "val", train_split="train")
    result = rank_pairs(torch.eye(5), torch.eye(5)[[0, 1, 2, 1, 4]], location=queries.location)
    assert result.target.tolist() == [0, 1, 2, 1, 4]
    assert Ranks(queries=queries, result=result).metrics()["num_references"] == 4


@pytest.mark.objectstore
def test_remote_split_is_evaluated_in_one_pass_that_copies_no_shard(cvusa, tmp_path, s3_uri, make_shards, monkeypatch):
    config = ModelConfig(
        backbone=BackboneConfig(blocks=(1, 1), width=1 / 16, num_frozen_blocks=0),
        head=HeadConfig(kind="conv", channels=4, grid=(8, 8)),
    )
    preprocess = PreprocessConfig(ground_size_px=(16, 48), aerial_size_px=(32, 32))
    torch.manual_seed(0)
    model = build_model(config, preprocess)
    info = CheckpointInfo(model=config, preprocess=preprocess, epoch=1)
    folder = CheckpointFolder(str(tmp_path / "run"))
    folder.write(checkpoint_name(1), take_snapshot(model=model, info=info))
    checkpoint = folder.uri(checkpoint_name(1))
    opened = []
    open_input = Store.open_input
    monkeypatch.setattr(Store, "open_input", lambda store, path: opened.append(path) or open_input(store, path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    manifests = [make_shards(cvusa, uri).uri for uri in (str(tmp_path / "store"), s3_uri)]
    local, remote = (evaluate_checkpoint(checkpoint, manifest, batch_size=2) for manifest in manifests)
    assert torch.equal(local.result.match_rank, remote.result.match_rank)
    assert torch.equal(local.result.top_scores, remote.result.top_scores)
    assert not list((tmp_path / "home").rglob("*.tar"))
    assert sorted(path for path in opened if path.endswith(".tar")) == [
        shard.name for shard in remote.dataset.manifest.shards if "val-" in shard.name
    ]
    assert [bytes(image) for image in remote.dataset.read(3)] == [bytes(image) for image in local.dataset.read(3)]
