"""Trainings with hard negatives: stopped inside an epoch after mining they go on to the bit, on one rank and on two."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from cvft.checkpoint import read_info, read_state
from cvft.distributed import current_world
from cvft.errors import ConfigError
from jobs.config import ExperimentConfig
from jobs.training.rank import Training
from pipeline.manifest import Manifest
from tests.distributed_helper import run_distributed
from tests.jobs.test_resume import CPU, assert_same, newest, run, run_until

# The first epoch in metres, mined before the second and the third.
HARD = (
    "train.num_epochs=3",
    "train.evaluate_every=3",
    "train.loss.kind=info_nce",
    "train.optimizer.learning_rate=1e-2",
    "train.augment.flip=0.5",
    "train.sampling.kind=hard",
    "train.sampling.pool_size=4",
    "train.sampling.num_hard=2",
    "train.sampling.mine_from=1",
    "train.sampling.mine_every=1",
)


def pools_of(config: ExperimentConfig) -> tuple[torch.Tensor, int]:
    """Return the table of neighbours in the newest checkpoint, and the epoch that it was made for."""
    state = read_state(newest(config), "neighbours")
    return state.tensors["pools"], state.values["made_in"]


def cut_and_go_on(straight: ExperimentConfig, cut: ExperimentConfig) -> None:
    """Do one training in one go and the other with a power cut in its last epoch; rank 0 compares them."""
    assert run(straight)
    run_until(cut, read_info(newest(straight)).step - 1)
    assert run(cut)
    if current_world().rank == 0:
        assert_same(cut, straight)
        (pools, made_in), (expected, expected_in) = pools_of(cut), pools_of(straight)
        assert torch.equal(pools, expected)
        assert made_in == expected_in == 2


def test_cut_off_inside_an_epoch_it_goes_on_with_the_batches_of_the_table_it_had(tiny):
    cut_and_go_on(*(tiny(f"name={name}", *HARD, "train.checkpoint_every_steps=1") for name in ("a", "b")))


def test_the_table_is_in_metres_first_and_then_follows_the_weights(tiny):
    config = tiny(*HARD, "train.checkpoint_every_steps=1", "train.keep_last=100")
    steps = Training(config, CPU)._train_loader.num_steps
    tables = []
    for epoch in range(3):
        run_until(config, epoch * steps + 1)
        tables.append(pools_of(config))
    assert [made_in for _, made_in in tables] == [0, 1, 2]
    assert not torch.equal(tables[1][0], tables[2][0])
    location_m = Manifest.load(config.data.manifest).location_m("train")
    apart_m = np.linalg.norm(location_m[:, None] - location_m[None], axis=-1)
    np.fill_diagonal(apart_m, np.inf)
    np.testing.assert_array_equal(tables[0][0], np.argsort(apart_m, axis=1)[:, :4])


def two_ranks(straight: ExperimentConfig, cut: ExperimentConfig) -> None:
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")  # torch, of 1x1 channels_last
    cut_and_go_on(straight, cut)


@pytest.mark.slow
def test_so_do_two_ranks_and_their_first_batches_are_those_of_one(tiny):
    straight, cut, alone = (tiny(f"name={name}", *HARD, "train.checkpoint_every_steps=1") for name in ("a", "b", "one"))
    run_distributed(two_ranks, 2, straight, cut)
    run_until(alone, 2)
    curves = [read_state(newest(config), "curve").tensors["losses"][:2] for config in (straight, alone)]
    torch.testing.assert_close(*curves, atol=1e-4, rtol=0)


def test_more_pairs_at_one_place_than_batches_can_hold_apart_are_refused_by_name(tiny):
    with pytest.raises(ConfigError, match=r"train\.sampling: .* use a smaller train\.batch_size or"):
        run(tiny(*HARD, "train.sampling.min_distance_m=100000"))
