"""The real network, transport included, over several processes."""

import copy
import math

import pytest
import torch

from cvft.batch import Batch
from cvft.config import BackboneConfig, HeadConfig, LossConfig, ModelConfig, PreprocessConfig, TransportConfig
from cvft.distributed import current_world, gather_with_gradient, unwrap, wrap_ddp
from cvft.engine import train_epoch
from cvft.errors import TrainingError
from cvft.loss import build_loss
from cvft.model import build_model
from cvft.preprocess import Preprocess
from tests.distributed_helper import run_distributed

PREPROCESS = PreprocessConfig(ground_size_px=(32, 96), aerial_size_px=(64, 64), std=(64.0, 64.0, 64.0))
CONFIG = ModelConfig(
    backbone=BackboneConfig(blocks=(1, 1, 1), width=0.125, dropout=0.0, num_frozen_blocks=1),
    head=HeadConfig(channels=4, grid=(8, 8), transport=TransportConfig(init="zero")),
)
BATCH_SIZE = 8


def _network():
    torch.manual_seed(0)
    return build_model(CONFIG, PREPROCESS)


def _batch(rows: torch.Tensor) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shapes = (*PREPROCESS.ground_size_px, 3), (*PREPROCESS.aerial_size_px, 3)
    ground, aerial = (
        torch.randint(256, (BATCH_SIZE, *shape), dtype=torch.uint8, generator=generator) for shape in shapes
    )
    location_m = torch.zeros(BATCH_SIZE, 3, dtype=torch.float64)
    return Batch(ground=ground[rows], aerial=aerial[rows], index=rows, location_m=location_m[rows], num_valid=len(rows))


def _my_rows() -> torch.Tensor:
    world = current_world()
    return torch.arange(BATCH_SIZE)[world.rank :: world.size]


def _check_step_equals_one_process() -> None:
    preprocess, loss = Preprocess(PREPROCESS), build_loss(LossConfig())
    alone = _network()
    together = wrap_ddp(copy.deepcopy(alone))
    whole, mine = _batch(torch.arange(BATCH_SIZE)), _batch(_my_rows())
    expected = loss(*alone(preprocess(whole.ground), preprocess(whole.aerial)))
    expected.backward()
    ground, aerial = together(preprocess(mine.ground), preprocess(mine.aerial))
    found = loss(gather_with_gradient(ground), gather_with_gradient(aerial))
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for name, parameter in alone.named_parameters():
        theirs = unwrap(together).get_parameter(name).grad
        assert (parameter.grad is None) == (theirs is None) == (not parameter.requires_grad), name
        if theirs is not None:
            assert parameter.grad.abs().max() > 0, name
            assert (parameter.grad - theirs).abs().max() <= 1e-5 * parameter.grad.abs().max(), name


def _check_nan_on_one_rank_stops_all() -> None:
    network = _network()
    together = wrap_ddp(network)
    normalise, rank = Preprocess(PREPROCESS), current_world().rank

    def broken_on_the_last_rank(pixels: torch.Tensor) -> torch.Tensor:
        return normalise(pixels) * (math.nan if rank == current_world().size - 1 else 1.0)

    with pytest.raises(TrainingError, match=r"step 3: the loss is nan on the pairs \[0, 1, 2, 3, 4, 5, 6, 7\]"):
        train_epoch(
            together,
            [_batch(_my_rows())],
            preprocess=broken_on_the_last_rank,
            loss=build_loss(LossConfig()),
            optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
            learning_rate=lambda step: 1.0,
            first_step=3,
            seed=0,
        )


@pytest.mark.parametrize("check", [_check_step_equals_one_process, _check_nan_on_one_rank_stops_all])
def test_two_processes_and_the_real_network(check):
    run_distributed(check, 2)
