"""Hard batches hold every pair once, no place twice, are fixed for good, and are as hard as the table says."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cvft.errors import ConfigError
from pipeline.geography import NeighbourTree
from pipeline.hard_batches import grouped_permutation
from pipeline.sampler import dropped_tail, epoch_permutation, rank_rows, train_batches


def order_of(table, *, place=None, batch_size=8, num_hard=4, seed=0, epoch=0):
    place = np.arange(len(table)) if place is None else np.asarray(place)
    return grouped_permutation(table, place=place, batch_size=batch_size, num_hard=num_hard, seed=seed, epoch=epoch)


def ring(num_pairs: int, width: int) -> np.ndarray:
    """Pairs on a circle, whose neighbours are the next ones to either side."""
    steps = np.ravel([(step, -step) for step in range(1, width + 1)])
    return ((np.arange(num_pairs)[:, None] + steps) % num_pairs).astype(np.int32)


@st.composite
def splits(draw):
    """A table of neighbours with gaps, a place for every pair, and a size of batches."""
    num_pairs = draw(st.integers(1, 60))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_places = draw(st.integers(1, num_pairs))
    skew = draw(st.sampled_from([0.0, 1.0, 3.0]))  # from places of equal size to one that has most pairs
    weights = (1.0 + np.arange(num_places)) ** -skew
    place = generator.choice(num_places, num_pairs, p=weights / weights.sum())
    table = generator.random((num_pairs, num_pairs)).argsort(axis=1)[:, : draw(st.integers(1, 12))].astype(np.int32)
    table[(table == np.arange(num_pairs)[:, None]) | (generator.random(table.shape) < 0.2)] = -1
    return table, place, draw(st.integers(1, num_pairs))


def can_be_filled(place: np.ndarray, batch_size: int) -> bool:
    """Whether batches of different places exist: a place can fill one seat of each batch, and there are B * S seats."""
    num_batches = len(place) // batch_size
    return int(np.minimum(np.bincount(place), num_batches).sum()) >= num_batches * batch_size


@settings(deadline=None)
@given(split=splits(), seed=st.integers(0, 2**63), num_hard=st.integers(1, 12))
def test_every_pair_comes_once_and_no_batch_has_a_place_twice_whenever_that_can_be_done(split, seed, num_hard):
    table, place, batch_size = split
    arguments = {"place": place, "batch_size": batch_size, "num_hard": num_hard, "seed": seed, "epoch": 3}
    if not can_be_filled(place, batch_size):
        with pytest.raises(ConfigError, match="of different places cannot be made"):
            order_of(table, **arguments)
        return
    order = order_of(table, **arguments)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(len(table)))
    batches = list(train_batches(order, batch_size=batch_size))
    assert len(batches) == len(table) // batch_size
    assert all(len(set(place[batch])) == batch_size for batch in batches)
    assert len(dropped_tail(order, batch_size=batch_size)) < batch_size


@settings(deadline=None)
@given(split=splits(), epoch=st.integers(0, 100))
def test_the_tail_is_that_of_the_random_order_where_places_do_not_forbid_it(split, epoch):
    table, _, batch_size = split
    tails = [
        dropped_tail(order, batch_size=batch_size).tolist()
        for order in (
            order_of(table, batch_size=batch_size, epoch=epoch),
            epoch_permutation(len(table), seed=0, epoch=epoch),
        )
    ]
    assert tails[0] == tails[1]


def test_the_order_is_fixed_for_good():
    order = order_of(ring(1000, 8), place=np.arange(1000) // 2, batch_size=32, num_hard=8, seed=5, epoch=2)
    assert order[:12].tolist() == [218, 217, 220, 222, 213, 224, 644, 642, 647, 901, 903, 898]
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "6e71c1a70896756a"


@settings(deadline=None)
@given(split=splits())
def test_orders_differ_by_seed_and_epoch(split):
    table, _, batch_size = split
    assume(len(table) >= 30)
    orders = {tuple(order_of(table, batch_size=batch_size, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_a_group_is_a_pair_with_half_its_nearest_and_half_of_the_rest_of_its_pool():
    nearest, rest = {16, 17, 18, 19}, range(20, 36)
    table = np.tile(np.arange(16, 36, dtype=np.int32), (36, 1))
    groups = [
        set(batch.tolist())
        for seed in range(400)
        for batch in train_batches(order_of(table, batch_size=9, num_hard=8, seed=seed), batch_size=9)
        if nearest <= set(batch.tolist()) and min(batch) < 16  # the first that an epoch made, around a pair of no pool
    ]
    assert len(groups) > 100
    assert {len(group & set(rest)) for group in groups} == {4}
    counts = np.bincount([row for group in groups for row in group & set(rest)], minlength=36)[20:]
    expected = 4 * len(groups) / 16
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # 15 degrees of freedom, one in a thousand


def test_pairs_without_neighbours_are_placed_like_all_others():
    table = np.full((50, 4), -1, dtype=np.int32)
    assert sorted(order_of(table)) == list(range(50))


def test_hard_batches_are_harder_than_random_ones():
    points = np.random.default_rng(0).random((1500, 2)) * 1000
    table = NeighbourTree(points).nearest_others(24).index.astype(np.int32)

    def distance_m(order):
        batches = points[np.stack(list(train_batches(order, batch_size=32)))]
        apart = np.linalg.norm(batches[:, :, None] - batches[:, None], axis=-1)
        apart[:, np.arange(32), np.arange(32)] = np.inf
        return float(apart.min(axis=2).mean()), float(np.sort(apart, axis=2)[:, :, 7].mean())

    hard, random = (
        distance_m(order_of(table, batch_size=32, num_hard=16)),
        distance_m(epoch_permutation(1500, seed=0, epoch=0)),
    )
    assert hard[0] < random[0] / 3
    assert hard[1] < random[1] / 2


def test_hard_and_easy_batches_are_mixed_over_the_epoch():
    table = ring(3000, 16)
    batches = np.stack(list(train_batches(order_of(table, batch_size=20, num_hard=19), batch_size=20)))
    neighbours = np.array([np.isin(table[batch], batch).sum() for batch in batches])
    halves = neighbours[:75].mean(), neighbours[75:].mean()
    assert halves[0] == pytest.approx(halves[1], rel=0.15)


@settings(deadline=None)
@given(world_size=st.sampled_from([1, 2, 4, 8]), first_step=st.integers(0, 5))
def test_ranks_share_the_batches_of_one_process_and_a_resumed_epoch_goes_on_with_them(world_size, first_step):
    order = order_of(ring(50, 6))
    whole = list(train_batches(order, batch_size=8))[first_step:]
    for step, batch in enumerate(train_batches(order_of(ring(50, 6)), batch_size=8, first_step=first_step)):
        joined = np.empty(8, dtype=np.int64)
        for rank in range(world_size):
            joined[rank::world_size] = rank_rows(batch, world_rank=rank, world_size=world_size)
        np.testing.assert_array_equal(joined, whole[step])
