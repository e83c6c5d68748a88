"""N processes compute what one process computes on the joined batch: gathers, a full step, the loops around it."""

import copy
import dataclasses
import itertools
import math
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cvft.batch import Batch
from cvft.config import BackboneConfig, HeadConfig, LossConfig, ModelConfig, PreprocessConfig, TransportConfig
from cvft.distributed import World, alone, current_world, gather, gather_with_gradient, unwrap, wrap_ddp
from cvft.engine import embed, evaluate, train_epoch
from cvft.errors import TrainingError
from cvft.gradients import Forward, Preprocessor, compute_gradients
from cvft.loss import build_loss
from cvft.model import build_model
from cvft.preprocess import Preprocess
from tests.cvft.tiny import TinyModel, eval_batches, preprocess, random_batch, train_batches
from tests.distributed_helper import run_distributed

LOSSES = (
    LossConfig(),
    LossConfig(gamma=3.0, mask_distance_m=15.0),
    LossConfig(kind="info_nce"),
    LossConfig(kind="info_nce", temperature=0.5, label_smoothing=0.0, mask_distance_m=15.0),
)
TOLERANCES = ((torch.float32, 1e-6), (torch.float64, 1e-10))
SIZES = PreprocessConfig(ground_size_px=(32, 96), aerial_size_px=(64, 64), std=(64.0, 64.0, 64.0))
NETWORK = ModelConfig(
    backbone=BackboneConfig(blocks=(1, 1, 1), width=0.125, dropout=0.25, num_frozen_blocks=1),
    head=HeadConfig(channels=4, grid=(8, 8), transport=TransportConfig(init="zero")),
)
NETWORK_BATCH = 8


def test_without_a_process_group_nothing_changes():
    model, tensor = TinyModel(), torch.ones(3, 2, requires_grad=True)
    assert current_world() == World(rank=0, size=1)
    assert wrap_ddp(model) is model is unwrap(model)
    assert gather_with_gradient(tensor) is tensor
    assert not gather(tensor).requires_grad


def _check_gather() -> None:
    world = current_world()
    for num_rows in (6 * world.size, 6 * world.size - 1, world.size):
        rows = torch.arange(num_rows * 2).reshape(-1, 2)
        mine = rows[world.rank :: world.size]
        assert torch.equal(gather(mine, num_rows=num_rows), rows)
        assert torch.equal(gather(mine[:, 0], num_rows=num_rows), rows[:, 0])
        if num_rows % world.size == 0:
            assert torch.equal(gather(mine), rows)
        if world.rank == 0:  # the others do not come
            with alone():
                assert current_world() == World()
                assert torch.equal(gather(mine), mine)
        assert current_world() == world
        leaf = mine.double().requires_grad_()
        (gather_with_gradient(leaf, num_rows=num_rows) ** 3).sum().backward()
        assert torch.equal(leaf.grad, 3 * world.size * mine.double() ** 2)
    for num_rows, held in ((6 * world.size, 5), (world.size - 1, 1)):
        with pytest.raises(ValueError, match=f"rank {world.rank} of {world.size} holds {held} rows of {num_rows}, not"):
            gather(torch.zeros(held), num_rows=num_rows)


def _count_bucket(counted: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average as DDP does, and count."""
    counted.append(bucket.index())
    average = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return average.then(lambda done: done.value()[0] / current_world().size)


def _one_pass(model: nn.Module, whole: Batch, forward: Forward, config: LossConfig) -> tuple[Tensor, list[Tensor]]:
    """One process's loss on the joined batch, and the gradients of the network and of the loss."""
    loss = build_loss(config)
    value = loss(*forward(model, whole, slice(0, len(whole.index))), location_m=whole.location_m)
    value.backward()
    return value.detach(), [parameter.grad for parameter in itertools.chain(model.parameters(), loss.parameters())]


def _check_step(
    model: nn.Module, whole: Batch, pixels: Preprocessor, config: LossConfig, dtype: torch.dtype, tolerance: float
) -> None:
    """A step under DDP, at once and in chunks, beside one pass of one process over the joined batch.

    Gradients are held against the largest one: some tensors are small sums of large terms, and float32 keeps little of
    those. Where the one process in float32 is itself further than `tolerance` from float64, as far is far enough.
    """
    world, size = current_world(), len(whole.index)
    parts = {
        name: getattr(whole, name)[world.rank :: world.size] for name in ("ground", "aerial", "index", "location_m")
    }
    mine = dataclasses.replace(whole, **parts, num_valid=len(parts["index"]), num_global=size)
    model.to(dtype)
    forward = Forward(preprocess=lambda images: pixels(images).to(dtype), seed=1, step=2)
    in_float64 = dataclasses.replace(forward, preprocess=lambda images: pixels(images).double())
    expected, gradients = _one_pass(copy.deepcopy(model), whole, forward, config)
    _, exact = _one_pass(copy.deepcopy(model).double(), whole, in_float64, config)
    trained = [(one, best) for one, best in zip(gradients, exact, strict=True) if one is not None]
    allowed = max(
        tolerance * max(one.abs().max() for one, _ in trained), *((one - best).abs().max() for one, best in trained)
    )
    together, loss, counted = wrap_ddp(model), build_loss(config), []
    together.register_comm_hook(counted, _count_bucket)
    for chunk_size in (None, 1, 3):
        counted.clear()
        together.zero_grad()
        loss.zero_grad()
        found = compute_gradients(
            together, mine, forward=dataclasses.replace(forward, chunk_size=chunk_size), loss=loss
        )
        assert sorted(set(counted)) == sorted(counted) != []  # the gradients travel once a step, after the last chunk
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
        for one, ours in zip(gradients, itertools.chain(model.parameters(), loss.parameters()), strict=True):
            assert (one is None) == (ours.grad is None) == (not ours.requires_grad)
            if one is not None:
                assert one.abs().max() > 0
                assert (one - ours.grad).abs().max() <= allowed, (config, dtype, one.shape, chunk_size)


def _check_steps() -> None:
    (whole,) = train_batches(1, size=16)
    for config, (dtype, tolerance) in itertools.product(LOSSES, TOLERANCES):
        _check_step(TinyModel(dropout=0.25), whole, preprocess, config, dtype, tolerance)


def _network() -> nn.Module:
    torch.manual_seed(0)
    return build_model(NETWORK, SIZES)


def _images(rows: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ground, aerial = (
        torch.randint(256, (NETWORK_BATCH, *size, 3), dtype=torch.uint8, generator=generator)
        for size in (SIZES.ground_size_px, SIZES.aerial_size_px)
    )
    return dataclasses.replace(random_batch(rows, num_global=NETWORK_BATCH), ground=ground[rows], aerial=aerial[rows])


def _check_steps_of_the_real_network() -> None:
    """Trunks with frozen blocks and dropout, transport, each loss with the distance mask."""
    whole = _images(torch.arange(NETWORK_BATCH))
    for config, (dtype, tolerance) in itertools.product(LOSSES[1::2], TOLERANCES):
        _check_step(_network(), whole, Preprocess(SIZES), config, dtype, tolerance)


def _check_nan_on_one_rank_stops_all() -> None:
    network, world, normalise = _network(), current_world(), Preprocess(SIZES)

    def broken_on_the_last_rank(pixels: Tensor) -> Tensor:
        return normalise(pixels) * (math.nan if world.rank == world.size - 1 else 1.0)

    with pytest.raises(TrainingError, match=r"step 3: the loss is nan on the pairs \[0, 1, 2, 3, 4, 5, 6, 7\]"):
        train_epoch(
            wrap_ddp(network),
            [_images(torch.arange(NETWORK_BATCH)[world.rank :: world.size])],
            preprocess=broken_on_the_last_rank,
            loss=build_loss(LossConfig()),
            optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
            learning_rate=lambda step: 1.0,
            first_step=3,
            seed=0,
        )


def _check_train_and_evaluate() -> None:
    world = current_world()
    model = TinyModel()
    alone = copy.deepcopy(model)
    together = wrap_ddp(model)
    losses: list[float] = []
    report = train_epoch(
        together,
        train_batches(4, size=8, rank=world.rank, world=world.size),
        preprocess=preprocess,
        loss=build_loss(LossConfig()),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        learning_rate=lambda step: 0.05,
        first_step=0,
        seed=0,
        on_step=lambda step: losses.append(step.loss),
    )
    assert report.num_steps == 4
    assert report.pairs_per_s * report.seconds == pytest.approx(4 * 8)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
    for batch, found in zip(train_batches(4, size=8), losses, strict=True):
        optimizer.zero_grad()
        loss = build_loss(LossConfig())(*alone(preprocess(batch.ground), preprocess(batch.aerial)))
        loss.backward()
        optimizer.step()
        assert abs(loss.item() - found) < 1e-5
    for mine, theirs in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)

    batches = list(eval_batches(21, size=8, rank=world.rank, world=world.size))
    found = embed(together, batches, preprocess=preprocess, num_pairs=21)
    with torch.no_grad():
        (whole,) = eval_batches(21, size=21)
        ground, aerial = model(preprocess(whole.ground), preprocess(whole.aerial))
    torch.testing.assert_close(found.ground, ground, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.aerial, aerial, rtol=0, atol=1e-6)
    assert torch.equal(found.index, torch.arange(21))
    assert torch.equal(found.location_m[:, 0], torch.arange(21) * 10.0)
    result = evaluate(together, batches, preprocess=preprocess, num_pairs=21)
    assert len(result.match_rank) == 21


def _check_all() -> None:
    _check_gather()
    _check_steps()
    _check_steps_of_the_real_network()
    _check_train_and_evaluate()
    _check_nan_on_one_rank_stops_all()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_several_processes_equal_one_on_the_joined_batch(world_size):
    run_distributed(_check_all, world_size)


def _fail_on_rank_one() -> None:
    assert current_world().rank == 0, "the second rank is not the first"
    time.sleep(60)  # the first one is busy; it is ended when the second fails


def test_a_failing_rank_shows_its_traceback():
    with pytest.raises(Exception, match="the second rank is not the first"):
        run_distributed(_fail_on_rank_one, 2)
