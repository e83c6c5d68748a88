"""Neighbours in metres and by descriptor are the true ones, never of one place, and found when they are due."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

from cvft.engine import Descriptors
from cvft.errors import CheckpointError, ConfigError
from pipeline.mining import HardNegatives, Places, SamplingConfig, merge_near, pools_by_descriptor, pools_by_distance
from pipeline.sampler import train_batches
from tests.distributed_helper import run_distributed

CPU = torch.device("cpu")
HARD = SamplingConfig(kind="hard", pool_size=6, num_hard=4, mine_from=2, mine_every=3)


def random_places(num_pairs=80, *, seed=0, num_unlocated=5, **options) -> Places:
    """Places on a plane of 1 km, three pairs at each of the first ten, some without a location."""
    generator = np.random.default_rng(seed)
    location_m = np.pad(generator.random((num_pairs, 2)) * 1000, ((0, 0), (0, 1)))
    location_m[10:30] = np.tile(location_m[:10], (2, 1))
    location_m[num_pairs - num_unlocated :] = np.nan
    return Places(code=np.r_[np.tile(np.arange(10), 3), 10 : num_pairs - 20], location_m=location_m, **options)


def random_descriptors(num_pairs=80, seed=0) -> Descriptors:
    generator = torch.Generator().manual_seed(seed)
    ground, aerial = (functional.normalize(torch.randn(num_pairs, 16, generator=generator), dim=1) for _ in range(2))
    return Descriptors(
        ground=ground, aerial=aerial, index=torch.arange(num_pairs), location_m=torch.zeros(num_pairs, 3).double()
    )


def brute_force(places: Places, nearness: np.ndarray, pool_size: int) -> np.ndarray:
    """For every pair all others, least `nearness` [N, N] first, without those of its place and those too near."""
    apart_m = np.linalg.norm(places.location_m[:, None] - places.location_m[None], axis=-1)
    pools = np.full((len(places), pool_size), -1)
    for row in range(len(places)):
        allowed = [
            (nearness[row, other], other)
            for other in range(len(places))
            if places.code[other] != places.code[row]
            and not np.isnan(nearness[row, other])
            and not (places.mask_distance_m is not None and apart_m[row, other] < places.mask_distance_m)
        ]
        best = [other for _, other in sorted(allowed)[:pool_size]]
        pools[row, : len(best)] = best
    return pools


@pytest.mark.parametrize("mask_distance_m", [None, 90.0])
@pytest.mark.parametrize("pool_size", [1, 9, 30])
def test_pools_in_metres_are_those_of_a_brute_force_search(pool_size, mask_distance_m):
    places = random_places(mask_distance_m=mask_distance_m)
    apart_m = np.linalg.norm(places.location_m[:, None] - places.location_m[None], axis=-1)
    expected = brute_force(places, apart_m, pool_size)
    found = pools_by_distance(places, pool_size=pool_size, device=CPU).numpy()
    # At the end of a pool it is the tree's choice which of those at one place it holds.
    np.testing.assert_array_equal(found[:, :-3], expected[:, :-3])
    np.testing.assert_array_equal(found < 0, expected < 0)
    distances_m = [np.take_along_axis(apart_m, pools, axis=1) for pools in (found, expected)]
    np.testing.assert_array_equal(*distances_m)
    assert all(len(set(pool)) == pool_size for pool in found[:75].tolist())
    assert not (places.code[found] == places.code[:, None])[:75].any()
    assert (found[-5:] == -1).all()  # the pairs without a location
    assert not np.isin(found, np.arange(75, 80)).any()


@pytest.mark.parametrize("mask_distance_m", [None, 90.0])
@pytest.mark.parametrize("pool_size", [1, 9, 30])
def test_pools_by_descriptor_are_those_of_a_brute_force_search(pool_size, mask_distance_m):
    places, found = random_places(mask_distance_m=mask_distance_m), random_descriptors()
    distance = -(found.ground.double() @ found.aerial.double().T).numpy()
    expected = brute_force(places, distance, pool_size)
    pools = pools_by_descriptor(places, ground=found.ground, aerial=found.aerial, pool_size=pool_size, device=CPU)
    np.testing.assert_array_equal(pools.numpy(), expected)


def test_a_crowd_at_one_place_has_short_pools_and_costs_the_others_nothing():
    places = Places(
        code=np.r_[np.zeros(50, np.int64), 1:31], location_m=np.c_[np.r_[np.zeros(50), 1:31], np.zeros((80, 2))]
    )
    pools = pools_by_distance(places, pool_size=5, device=CPU).numpy()
    assert (pools[:50] == -1).all()
    np.testing.assert_array_equal(
        pools[70:75], brute_force(places, np.abs(np.subtract.outer(*[places.location_m[:, 0]] * 2)), 5)[70:75]
    )


def test_pools_hold_what_there_is_of_a_small_split():
    places = Places(code=np.arange(3), location_m=np.array([[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]))
    assert pools_by_distance(places, pool_size=4, device=CPU).tolist() == [
        [1, 2, -1, -1],
        [0, 2, -1, -1],
        [1, 0, -1, -1],
    ]


def test_pairs_nearer_than_the_least_distance_are_one_place_and_so_are_their_chains(cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"))
    of_ids = Places.of_split(manifest, "train", min_distance_m=None, mask_distance_m=None)
    assert len(set(of_ids.code)) == len(of_ids) == 11
    apart_m = np.linalg.norm(np.diff(of_ids.location_m, axis=0), axis=1)  # neighbours in a row of 15.6 m steps
    merged = Places.of_split(manifest, "train", min_distance_m=float(apart_m.min()), mask_distance_m=None)
    assert len(set(merged.code)) > 1
    chained = Places.of_split(manifest, "train", min_distance_m=100.0, mask_distance_m=None)
    assert len(set(chained.code)) == 1


def test_pairs_of_one_location_id_are_one_place(cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"))
    names = pa.array([f"tile-{row // 2}" for row in range(manifest.pairs.num_rows)])
    manifest.pairs = manifest.pairs.set_column(manifest.pairs.column_names.index("location_id"), "location_id", names)
    code = Places.of_split(manifest, "train", min_distance_m=None, mask_distance_m=None).code
    split = manifest.split("train")["location_id"].to_pylist()
    assert [[a == b for a in code] for b in code] == [[a == b for a in split] for b in split]


@pytest.mark.parametrize("distance_m", [10.0, 60.0, 90.0, 2000.0])
def test_merged_places_are_those_that_a_walk_of_short_steps_connects(distance_m):
    location_m = random_places(60, num_unlocated=3).location_m
    is_connected = np.linalg.norm(location_m[:, None] - location_m[None], axis=-1) < distance_m
    np.fill_diagonal(is_connected, True)
    for _ in range(6):  # paths of up to 2^6 steps
        is_connected = is_connected.astype(np.int64) @ is_connected > 0
    code = merge_near(np.arange(60), location_m, distance_m)
    np.testing.assert_array_equal(code[:, None] == code[None], is_connected)
    assert sorted(set(code)) == list(range(code.max() + 1))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (HARD, [(0, False), (0, False), (2, True), (2, True), (2, True), (5, True), (5, True)]),
        (dataclasses.replace(HARD, mine_from=None), [(0, False)] * 7),
        (dataclasses.replace(HARD, mine_from=0, mine_every=1), [(epoch, True) for epoch in range(7)]),
    ],
)
def test_the_table_is_in_metres_first_and_mined_anew_when_due(config, expected):
    assert [(config.made_in(epoch), config.is_mined(epoch)) for epoch in range(7)] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool_size": 0}, "pool_size: 0 must be at least 1"),
        ({"num_hard": 7}, "num_hard: 7 must be at most pool_size=6"),
        ({"mine_from": -1}, "mine_from: -1 must not be negative, or null for never"),
        ({"mine_every": 0}, "mine_every: 0 must be at least 1"),
        ({"min_distance_m": 0.0}, "min_distance_m: 0.0 must be positive, or null for none"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(HARD, **changes)


class Training:
    """A training as far as the order of its pairs goes; each epoch has other descriptors."""

    def __init__(self, config: SamplingConfig = HARD, places: Places | None = None) -> None:
        self.hard = HardNegatives(config, places or random_places(), batch_size=8, seed=1, device=CPU)
        self.embedded_in: list[int] = []

    def order(self, epoch: int) -> list[int]:
        def embed() -> Descriptors:
            self.embedded_in.append(epoch)
            return random_descriptors(seed=epoch)

        self.hard.prepare(epoch, embed)
        return self.hard.order(epoch).tolist()


def test_the_split_is_embedded_when_a_table_is_due_and_not_else():
    training = Training()
    orders = [training.order(epoch) for epoch in range(9)]
    assert training.embedded_in == [2, 5, 8]
    assert len(set(map(tuple, orders))) == 9
    never = Training(dataclasses.replace(HARD, mine_from=None))
    assert [never.order(epoch) for epoch in range(2)] == orders[:2]
    assert never.order(2) != orders[2]
    assert never.embedded_in == []


@pytest.mark.parametrize("epoch", range(7))
def test_a_training_continued_with_the_table_of_its_checkpoint_has_the_same_batches(epoch):
    straight, stopped = Training(), Training()
    for done in range(epoch + 1):
        straight.order(done)
        stopped.order(done)
    continued = Training()
    continued.hard.restore(stopped.hard.state())
    assert continued.order(epoch) == straight.order(epoch)  # from a checkpoint inside the epoch
    assert continued.embedded_in == []
    assert continued.order(epoch + 1) == straight.order(epoch + 1)
    assert continued.embedded_in == [due for due in straight.embedded_in if due == epoch + 1]


def test_a_checkpoint_from_before_the_first_epoch_has_no_table_yet():
    continued = Training()
    continued.hard.restore(Training().hard.state())
    assert continued.order(0) == Training().order(0)


def test_a_table_of_another_split_is_refused():
    other = Training(places=random_places(90))
    other.order(0)
    with pytest.raises(CheckpointError, match="are 6 for each of 90 pairs, but the training split has 80 pairs"):
        Training().hard.restore(other.hard.state())


def test_an_order_without_its_table_is_a_fault():
    with pytest.raises(RuntimeError, match="the neighbours of epoch 0 are not there"):
        Training().hard.order(0)


def _check_orders(expected: list[list[int]]) -> None:
    training = Training()
    assert [training.order(epoch) for epoch in range(len(expected))] == expected


def test_ranks_agree_on_the_batches_of_one_process():
    alone = Training()
    run_distributed(_check_orders, 2, [alone.order(epoch) for epoch in range(4)])


def test_mined_batches_are_harder_than_random_ones():
    centres = functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    kind = torch.arange(800) % 40
    noise = torch.randn(2, 800, 16, generator=torch.Generator().manual_seed(1)) / 8
    ground, aerial = functional.normalize(centres[kind] + noise, dim=2)
    nowhere = Places(code=np.arange(800), location_m=np.full((800, 3), np.nan))
    config = SamplingConfig(kind="hard", pool_size=24, num_hard=12, mine_from=1)
    hard = HardNegatives(config, nowhere, batch_size=16, seed=0, device=CPU)
    found = dataclasses.replace(random_descriptors(800), ground=ground, aerial=aerial)

    def hardness(epoch):
        """Mean similarity of a ground image to the most similar aerial image that is not its own."""
        hard.prepare(epoch, lambda: found)
        batches = np.stack(list(train_batches(hard.order(epoch), batch_size=16)))
        similarity = ground[batches] @ aerial[batches].transpose(1, 2)
        similarity.diagonal(dim1=1, dim2=2).fill_(-1)
        return similarity.amax(dim=2).mean().item(), np.mean([len(set((batch % 40).tolist())) for batch in batches])

    (random, num_kinds), (mined, num_mined_kinds) = hardness(0), hardness(1)
    assert num_mined_kinds < num_kinds / 2
    assert mined > random + 0.2


def test_pairs_without_a_place_are_counted_and_a_split_without_any_is_a_warning(caplog):
    with caplog.at_level("INFO", logger="pipeline.mining"):
        Training().order(0)
        Training(places=random_places(num_unlocated=80)).order(0)
    first, second = caplog.records
    assert (first.levelname, second.levelname) == ("INFO", "WARNING")
    assert "epoch 1: hard negatives by distance in metres from pools of 6; 5 of 80 pairs have none" in first.message
    assert "80 of 80 pairs have none and are placed at random" in second.message
