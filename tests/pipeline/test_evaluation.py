"""Queries are told apart by whether they leak and by whom they share their reference with."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from cvft.pair_retrieval import rank_pairs
from pipeline.evaluation import Queries
from pipeline.manifest import Manifest


def replace_column(manifest: Manifest, name: str, values: dict[str, str]) -> Manifest:
    """Give some keys of a manifest another value in one column."""
    pairs = manifest.pairs
    changed = [values.get(key, old) for key, old in zip(pairs["key"].to_pylist(), pairs[name].to_pylist(), strict=True)]
    manifest.pairs = pairs.set_column(
        pairs.column_names.index(name), name, pa.array(changed, pairs.schema.field(name).type)
    )
    return manifest


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
    metrics = queries.metrics(rank_pairs(ground, torch.eye(5)))
    assert queries.location is None
    assert (metrics["recall_at_1"], metrics["recall_at_1_deleaked"]) == (0.8, 1.0)
    assert (metrics["num_leaked_queries"], metrics["num_queries"], metrics["num_references"]) == (1, 5, 5)


def test_without_leaks_both_recalls_are_the_same(manifest):
    metrics = Queries.of_split(manifest, "val", train_split="train").metrics(rank_pairs(torch.eye(5), torch.eye(5)))
    names = ("recall_at_1", "recall_at_5", "recall_at_10", "recall_at_1_percent")
    assert [metrics[f"{name}_deleaked"] for name in names] == [metrics[name] for name in names] == [1.0] * 4
    assert metrics["num_leaked_queries"] == 0


def test_without_a_training_split_deleaked_recall_is_unknown(manifest):
    metrics = Queries.of_split(manifest, "val", train_split="absent").metrics(rank_pairs(torch.eye(5), torch.eye(5)))
    assert metrics["recall_at_1"] == 1.0
    assert metrics["recall_at_1_deleaked"] is None
    assert metrics["num_leaked_queries"] is None


def test_when_every_query_leaks_no_deleaked_recall_is_made_up(manifest):
    train = manifest.split("train")["aerial_xxh3_128"][0].as_py()
    replace_column(manifest, "aerial_xxh3_128", dict.fromkeys(manifest.split("val")["key"].to_pylist(), train))
    metrics = Queries.of_split(manifest, "val", train_split="train").metrics(rank_pairs(torch.eye(5), torch.eye(5)))
    assert (metrics["num_leaked_queries"], metrics["recall_at_1_deleaked"]) == (5, None)


def test_pairs_of_one_location_share_their_reference(manifest):
    first, other = manifest.split("val")["key"].to_pylist()[1::2]
    replace_column(manifest, "location_id", {first: "there", other: "there"})
    queries = Queries.of_split(manifest, "val", train_split="train")
    result = rank_pairs(torch.eye(5), torch.eye(5)[[0, 1, 2, 1, 4]], location=queries.location)
    assert result.target.tolist() == [0, 1, 2, 1, 4]
    assert queries.metrics(result)["num_references"] == 4
