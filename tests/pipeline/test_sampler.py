"""Epochs are exact, the same for every number of ranks, and fixed for good."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvft.errors import ConfigError
from pipeline import sampler

SEEDS = st.integers(min_value=0, max_value=2**63)
SIZES = st.integers(min_value=1, max_value=300)
SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=200).map(lambda numbers: np.array(sorted(numbers)))


def test_permutation_is_fixed_for_good():
    assert sampler.epoch_permutation(10, seed=3, epoch=1).tolist() == [9, 7, 8, 3, 5, 6, 4, 0, 2, 1]


@given(num_pairs=SIZES, seed=SEEDS, epoch=st.integers(0, 1000))
def test_permutation_holds_every_row_once(num_pairs, seed, epoch):
    permutation = sampler.epoch_permutation(num_pairs, seed=seed, epoch=epoch)
    assert permutation.dtype == np.int64
    assert sorted(permutation) == list(range(num_pairs))


def test_permutations_differ_by_seed_and_epoch():
    orders = {tuple(sampler.epoch_permutation(50, seed=s, epoch=e)) for s in range(5) for e in range(5)}
    assert len(orders) == 25


def test_permutation_is_uniform():
    first = [sampler.epoch_permutation(8, seed=0, epoch=epoch)[0] for epoch in range(4000)]
    counts = np.bincount(first, minlength=8)
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 24.3  # 7 degrees of freedom, one in a thousand


@given(num_pairs=SIZES, batch_size=st.integers(1, 40), epoch=st.integers(0, 5))
def test_epoch_is_every_pair_once_but_for_a_named_tail(num_pairs, batch_size, epoch):
    order = sampler.epoch_permutation(num_pairs, seed=7, epoch=epoch)
    batches = list(sampler.train_batches(order, batch_size=batch_size))
    tail = sampler.dropped_tail(order, batch_size=batch_size)
    assert len(tail) < batch_size
    assert all(len(batch) == batch_size for batch in batches)
    assert sorted(np.concatenate([*batches, tail])) == list(range(num_pairs))


def test_cold_order_is_fixed_for_good():
    shards = np.repeat([4, 0, 7], 3)
    assert sampler.cold_permutation(shards, window=1, seed=3, epoch=0).tolist() == [6, 8, 7, 1, 2, 0, 5, 4, 3]


@given(shards=SHARDS, window=st.integers(1, 12), seed=SEEDS)
def test_cold_order_holds_every_row_once_and_uses_up_each_window_of_shards(shards, window, seed):
    order = sampler.cold_permutation(shards, window=window, seed=seed, epoch=0)
    assert sorted(order) == list(range(len(shards)))
    first_use = list(dict.fromkeys(shards[order].tolist()))
    rest = shards[order]
    for start in range(0, len(first_use), window):
        in_window = np.isin(rest, first_use[start : start + window])
        num_rows = int(in_window.sum())
        assert in_window[:num_rows].all()
        rest = rest[num_rows:]
    assert len(rest) == 0


@given(shards=SHARDS, seed=SEEDS)
def test_cold_order_with_all_shards_in_one_window_is_the_global_one(shards, seed):
    order = sampler.cold_permutation(shards, window=len(shards), seed=seed, epoch=0)
    np.testing.assert_array_equal(order, sampler.epoch_permutation(len(shards), seed=seed, epoch=0))


def test_cold_order_depends_on_the_seed_and_mixes_shards_and_rows():
    shards = np.repeat(np.arange(20), 50)
    orders = [sampler.cold_permutation(shards, window=4, seed=seed, epoch=0) for seed in range(5)]
    assert len({tuple(shards[order][:4]) for order in orders}) == 5
    firsts = [len(set(shards[order][:30].tolist())) for order in orders]
    assert firsts == [4] * 5


@given(shards=SHARDS, window=st.integers(1, 6), batch_size=st.integers(1, 20))
def test_cold_epoch_is_every_pair_once_but_for_a_named_tail(shards, window, batch_size):
    order = sampler.cold_permutation(shards, window=window, seed=5, epoch=0)
    tail = sampler.dropped_tail(order, batch_size=batch_size)
    assert len(tail) < batch_size
    batches = list(sampler.train_batches(order, batch_size=batch_size))
    assert sorted(np.concatenate([*batches, tail])) == list(range(len(shards)))


def test_tail_differs_from_epoch_to_epoch():
    orders = [sampler.epoch_permutation(103, seed=0, epoch=epoch) for epoch in range(10)]
    tails = {tuple(sampler.dropped_tail(order, batch_size=10)) for order in orders}
    assert len(tails) == 10


@given(num_pairs=SIZES, batch_size=st.integers(1, 40), first_step=st.integers(0, 50))
def test_resumed_epoch_continues_the_same_sequence(num_pairs, batch_size, first_step):
    order = sampler.epoch_permutation(num_pairs, seed=1, epoch=2)
    whole = list(sampler.train_batches(order, batch_size=batch_size))
    rest = list(sampler.train_batches(order, batch_size=batch_size, first_step=first_step))
    np.testing.assert_array_equal(whole[first_step:], rest)


@given(world_size=st.integers(1, 24), num_valid=st.integers(0, 24))
def test_rank_parts_interleave_to_the_global_batch_and_its_valid_rows(world_size, num_valid):
    batch = np.arange(100, 124)
    joined = np.empty_like(batch)
    valid = []
    for rank in range(world_size):
        part = sampler.rank_rows(batch, world_rank=rank, world_size=world_size)
        assert len(part) == sampler.rank_size(24, world_rank=rank, world_size=world_size)
        assert 24 // world_size <= len(part) <= -(-24 // world_size)
        joined[rank::world_size] = part
        valid.extend(part[: sampler.rank_num_valid(num_valid, world_rank=rank, world_size=world_size)])
    np.testing.assert_array_equal(joined, batch)
    assert sorted(valid) == batch[:num_valid].tolist()


@given(num_pairs=SIZES, batch_size=st.integers(1, 40))
def test_evaluation_is_every_pair_once_in_order_padded_to_whole_batches(num_pairs, batch_size):
    batches = list(sampler.eval_batches(num_pairs, batch_size=batch_size))
    assert all(len(rows) == batch_size for rows, _ in batches)
    assert np.concatenate([rows[:num_valid] for rows, num_valid in batches]).tolist() == list(range(num_pairs))
    assert all((rows < num_pairs).all() for rows, _ in batches)


def test_batch_that_ranks_cannot_share_is_refused():
    sampler.check_shared(4, world_size=4)
    with pytest.raises(ConfigError, match="batch_size: 3 pairs leave some of 4 ranks without any; use 4 or more"):
        sampler.check_shared(3, world_size=4)


@pytest.mark.parametrize("batch_size", [0, -4])
def test_batch_of_no_pairs_is_refused(batch_size):
    with pytest.raises(ConfigError, match=f"batch_size: {batch_size} must be at least 1"):
        sampler.check_shared(batch_size, world_size=1)


def test_batch_larger_than_the_split_is_refused():
    with pytest.raises(ConfigError, match="batch_size: 11 exceeds the split's 10 pairs"):
        sampler.check_fills(10, batch_size=11)
