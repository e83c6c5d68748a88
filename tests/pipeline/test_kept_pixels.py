"""Pixels kept in memory make the batches that a decoder makes, and each pair is decoded once."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cvft.batch import Batch
from cvft.config import PreprocessConfig
from cvft.errors import ConfigError
from pipeline import kept_pixels
from pipeline.dataset import PairDataset
from pipeline.loader import Loader

PREPROCESS = PreprocessConfig(ground_size_px=(28, 154), aerial_size_px=(64, 64))
CPU = torch.device("cpu")


@pytest.fixture
def dataset(cvusa, tmp_path, make_shards) -> PairDataset:
    return PairDataset(make_shards(cvusa, str(tmp_path / "store")), "train")


def loader(dataset: PairDataset, **options: object) -> Loader:
    return Loader(dataset, preprocess=PREPROCESS, batch_size=5, **options)


def values(batch: Batch) -> dict[str, object]:
    """The batch's fields; tensors as nested lists, because a decoder uses their memory again."""
    return {
        field.name: value.nan_to_num().tolist() if isinstance(value, torch.Tensor) else value
        for field in dataclasses.fields(batch)
        for value in [getattr(batch, field.name)]
    }


@pytest.mark.parametrize(("world_rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_batches_are_those_of_the_decoder(world_rank, world_size, dataset):
    rank = {"world_rank": world_rank, "world_size": world_size, "seed": 3}
    kept, decoded = loader(dataset, keep_on=CPU, **rank), loader(dataset, **rank)
    for epoch, first_step in ((0, 0), (1, 1)):
        expected = [values(batch) for batch in decoded.train_batches(epoch, first_step)]
        assert [values(batch) for batch in kept.train_batches(epoch, first_step)] == expected
        assert expected


def test_evaluation_is_padded_as_the_decoder_pads_it(dataset):
    kept = [values(batch) for batch in loader(dataset, keep_on=CPU).eval_batches()]
    assert kept == [values(batch) for batch in loader(dataset).eval_batches()]
    assert kept[-1]["num_valid"] < 5


def test_every_pair_is_read_once(dataset, monkeypatch):
    rows: list[int] = []
    read = dataset.read
    monkeypatch.setattr(dataset, "read", lambda row: rows.append(row) or read(row))
    kept = loader(dataset, keep_on=CPU)
    for epoch in range(3):
        assert len(list(kept.train_batches(epoch))) == kept.num_steps
    assert sorted(rows) == list(range(len(dataset)))


def test_a_batch_may_be_kept_while_the_next_ones_come(dataset):
    batches = list(loader(dataset, keep_on=CPU).train_batches(0))
    assert [values(batch) for batch in batches] == [
        values(batch) for batch in loader(dataset, keep_on=CPU).train_batches(0)
    ]


def test_pixels_that_do_not_fit_are_refused_with_both_sizes(dataset, monkeypatch):
    monkeypatch.setattr(kept_pixels, "free_bytes", lambda device: 100_000)
    with pytest.raises(ConfigError, match=r"data.keep_pixels: the \d+ pairs of split 'train' take 0.0 GB, and 0.0 GB"):
        loader(dataset, keep_on=CPU)


def test_free_memory_is_what_the_machine_tells():
    assert kept_pixels.free_bytes(CPU) > 50_000_000
