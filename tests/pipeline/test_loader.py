"""Batches hold the right pixels, the same ones for any number of ranks and threads, and stop at damage by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from cvft.batch import Batch
from cvft.config import PreprocessConfig
from cvft.errors import ConfigError, DataError
from pipeline import sampler
from pipeline.dataset import PairDataset
from pipeline.images import decode
from pipeline.loader import Loader
from pipeline.profile import ShardProfile, preresized

PREPROCESS = PreprocessConfig(ground_size_px=(28, 154), aerial_size_px=(64, 64))


@pytest.fixture
def dataset(cvusa, tmp_path, make_shards) -> PairDataset:
    return PairDataset(make_shards(cvusa, str(tmp_path / "store")), "train")


def loader(dataset: PairDataset, **options: int) -> Loader:
    return Loader(dataset, preprocess=PREPROCESS, **({"batch_size": 4} | options))


def copied(batch: Batch) -> Batch:
    tensors = {name: getattr(batch, name).clone() for name in ("ground", "aerial", "index", "location_m")}
    return dataclasses.replace(batch, **tensors)


def joined(parts: list[Batch]) -> dict[str, torch.Tensor]:
    """Interleave the ranks' parts of one global batch."""
    names = ("ground", "aerial", "index", "location_m")
    whole = {}
    for name in names:
        tensors = [getattr(part, name) for part in parts]
        whole[name] = tensors[0].new_empty(sum(map(len, tensors)), *tensors[0].shape[1:])
        for rank, tensor in enumerate(tensors):
            whole[name][rank :: len(parts)] = tensor
    return whole


def epoch(dataset: PairDataset, *, world_size: int = 1, first_step: int = 0, **options: int) -> list[dict]:
    ranks = [
        [
            copied(batch)
            for batch in loader(dataset, world_rank=rank, world_size=world_size, seed=5, **options).train_batches(
                epoch=3, first_step=first_step
            )
        ]
        for rank in range(world_size)
    ]
    return [joined(list(parts)) for parts in zip(*ranks, strict=True)]


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for left, right in zip(first, second, strict=True):
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_pixels_index_and_place_are_those_of_the_pair(profile, dataset):
    preprocess = dataclasses.replace(PREPROCESS, decode_profile=profile)
    for batch in Loader(dataset, preprocess=preprocess, batch_size=4).train_batches(epoch=0):
        assert (batch.ground.dtype, batch.ground.shape) == (torch.uint8, (4, 28, 154, 3))
        assert batch.aerial.shape == (4, 64, 64, 3)
        assert batch.num_valid == 4
        for position, row in enumerate(batch.index.tolist()):
            for pixels, data in zip((batch.ground, batch.aerial), dataset.read(row), strict=True):
                expected = np.empty(pixels.shape[1:], np.uint8)
                decode(data, expected, profile=profile)
                np.testing.assert_array_equal(pixels[position].numpy(), expected)
            np.testing.assert_array_equal(batch.location_m[position].numpy(), dataset.location_m[row])


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8])
def test_global_batches_are_the_same_for_any_number_of_ranks(world_size, dataset):
    assert_same(epoch(dataset, batch_size=8), epoch(dataset, batch_size=8, world_size=world_size))


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
def test_batches_are_the_same_for_any_number_of_threads(num_threads, dataset):
    assert_same(epoch(dataset), epoch(dataset, num_threads=num_threads))


@pytest.mark.parametrize("first_step", range(6))
def test_epoch_resumed_on_other_ranks_continues_the_same_sequence(first_step, dataset):
    whole = epoch(dataset, batch_size=2)
    assert len(whole) == 5
    assert_same(whole[first_step:], epoch(dataset, batch_size=2, first_step=first_step, world_size=2))


def test_epoch_is_every_pair_once_but_for_the_named_tail(dataset):
    batches = epoch(dataset)
    seen = [row for batch in batches for row in batch["index"].tolist()]
    tail = sampler.dropped_tail(loader(dataset, seed=5).epoch_order(3), batch_size=4).tolist()
    assert sorted(seen + tail) == list(range(11))
    assert loader(dataset).num_steps == len(batches) == 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_sees_every_pair_once_and_pads_the_last_batch(world_size, dataset):
    seen = []
    for rank in range(world_size):
        batches = list(map(copied, loader(dataset, world_rank=rank, world_size=world_size).eval_batches()))
        assert [len(batch.index) for batch in batches] == [len(range(rank, 4, world_size))] * 3
        assert [batch.num_global for batch in batches] == [4] * 3
        for batch in batches:
            seen.extend(batch.index[: batch.num_valid].tolist())
            assert not batch.ground[batch.num_valid :].any()
            assert not batch.aerial[batch.num_valid :].any()
    assert sorted(seen) == list(range(11))


def test_split_smaller_than_the_batch_is_evaluated_and_not_trained(dataset):
    (batch,) = loader(dataset, batch_size=16).eval_batches()
    assert batch.num_valid == 11
    with pytest.raises(ConfigError, match="exceeds the split's 11 pairs"):
        loader(dataset, batch_size=16).train_batches(0)


def test_batch_that_ranks_cannot_share_is_refused(dataset):
    with pytest.raises(ConfigError, match="batch_size: 4 pairs leave some of 5 ranks without any"):
        loader(dataset, world_size=5)


def test_loader_without_threads_is_refused(dataset):
    with pytest.raises(ConfigError, match="num_threads: 0 must be at least 1"):
        loader(dataset, num_threads=0)


def test_batch_in_use_is_not_written_to(dataset):
    for batch in loader(dataset, batch_size=1, num_threads=3).train_batches(0):
        before = copied(batch)
        torch.manual_seed(0)
        _ = torch.rand(300, 300) @ torch.rand(300, 300)  # time for the threads to run ahead
        assert torch.equal(batch.ground, before.ground)
        assert torch.equal(batch.aerial, before.aerial)


def test_buffers_are_used_again(dataset):
    addresses = [batch.ground.data_ptr() for batch in loader(dataset, batch_size=1).train_batches(0)]
    assert len(addresses) == 11
    assert len(set(addresses)) == 3


def test_epoch_can_be_left_early_and_begun_again(dataset):
    batches = loader(dataset, batch_size=1).train_batches(0)
    first = next(batches).index.item()
    batches.close()
    assert next(loader(dataset, batch_size=1).train_batches(0)).index.item() == first


def test_image_that_cannot_be_decoded_is_named(cvusa, tmp_path, make_shards):
    # Sharded without the check that would have found it.
    path = cvusa / "bingmap/19/0000013.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    manifest = make_shards(cvusa, str(tmp_path / "store"), check_images=False)
    with pytest.raises(DataError, match=r"val-0000\d\.tar, key 0000013: aerial image: Premature end of JPEG file"):
        list(loader(PairDataset(manifest, "val")).eval_batches())


def test_first_epoch_over_cold_shards_uses_them_up_in_windows_on_any_number_of_ranks(dataset):
    orders = [loader(dataset, seed=5, cold_start_window=window).epoch_order for window in (1, 2, None)]
    shards = dataset.shards[orders[0](0)].tolist()
    assert len(dict.fromkeys(shards)) == 3
    assert shards == sorted(shards, key=list(dict.fromkeys(shards)).index)
    later = [order(1).tolist() for order in orders]
    assert later[0] == later[1] == later[2]
    batches = [copied(batch) for batch in loader(dataset, seed=5, cold_start_window=1).train_batches(0)]
    assert torch.cat([batch.index for batch in batches]).tolist() == orders[0](0)[:8].tolist()
    options = {"seed": 5, "cold_start_window": 1, "world_size": 2}
    ranks = [map(copied, loader(dataset, world_rank=rank, **options).train_batches(0, 1)) for rank in range(2)]
    assert_same([joined([batches[1]])], [joined(list(parts)) for parts in zip(*ranks, strict=True)])


def test_an_order_of_ones_own_is_followed_on_any_number_of_ranks_and_from_any_step(dataset):
    def order(epoch):
        return np.roll(np.arange(11), epoch)

    alone = epoch(dataset, batch_size=2, order=order)
    assert torch.cat([batch["index"] for batch in alone]).tolist() == order(3)[:10].tolist()
    assert_same(alone[2:], epoch(dataset, batch_size=2, order=order, world_size=2, first_step=2))
    cold = loader(dataset, order=order, cold_start_window=1)
    assert cold.epoch_order(0).tolist() != order(0).tolist()
    assert cold.epoch_order(1).tolist() == order(1).tolist()


def with_profile(dataset: PairDataset, profile: ShardProfile) -> PairDataset:
    dataset.manifest.profile = profile
    return dataset


def test_decode_profile_and_the_shards_must_fit_each_other(dataset):
    sizes = (PREPROCESS.ground_size_px, PREPROCESS.aerial_size_px)
    taken_as_is = dataclasses.replace(PREPROCESS, decode_profile="preresized")
    with pytest.raises(
        ConfigError, match=r"preprocess.decode_profile: preresized .* does not fit .* images are original"
    ):
        Loader(dataset, preprocess=taken_as_is, batch_size=4)
    Loader(with_profile(dataset, preresized(*sizes)), preprocess=taken_as_is, batch_size=4)
    with pytest.raises(
        ConfigError, match=r"exact .* does not fit .* images are preresized \(ground 28x154, aerial 64x64"
    ):
        loader(dataset)
    with pytest.raises(ConfigError, match=r"preresized \(ground 28x154, aerial 64x64\) does not fit"):
        Loader(with_profile(dataset, preresized((28, 154), (64, 65))), preprocess=taken_as_is, batch_size=4)


def test_rows_that_are_not_used_are_cut_away(cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"))
    for name, row in (("ground_first_row_px", 14), ("ground_stop_row_px", 42)):
        column = pa.array([row] * manifest.pairs.num_rows, pa.int32())
        manifest.pairs = manifest.pairs.set_column(manifest.pairs.column_names.index(name), name, column)
    dataset = PairDataset(manifest, "val")
    for profile in ("exact", "fast"):
        preprocess = dataclasses.replace(PREPROCESS, decode_profile=profile)
        (batch,) = Loader(dataset, preprocess=preprocess, batch_size=5).eval_batches()
        for row in range(5):
            expected = np.empty((28, 154, 3), np.uint8)
            decode(dataset.read(row)[0], expected, profile=profile, rows_px=(14, 42))
            np.testing.assert_array_equal(batch.ground[row].numpy(), expected)
