import copy
import itertools
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cvft.config import LossConfig
from cvft.distributed import World, current_world, gather, gather_with_gradient, unwrap, wrap_ddp
from cvft.engine import embed, evaluate, train_epoch
from cvft.gradients import Forward, compute_gradients
from cvft.loss import Loss, build_loss
from tests.cvft.tiny import TinyModel, eval_batches, preprocess, train_batches
from tests.distributed_helper import run_distributed

LOSSES = (
    LossConfig(),
    LossConfig(gamma=3.0, mask_distance_m=15.0),
    LossConfig(kind="info_nce"),
    LossConfig(kind="info_nce", temperature=0.5, label_smoothing=0.0, mask_distance_m=15.0),
)


def test_without_a_process_group_nothing_changes():
    model, tensor = TinyModel(), torch.ones(3, 2, requires_grad=True)
    assert current_world() == World(rank=0, size=1)
    assert wrap_ddp(model) is model is unwrap(model)
    assert gather_with_gradient(tensor) is tensor
    assert not gather(tensor).requires_grad


def _joined_step(model: torch.nn.Module, loss: Loss, batch_size: int, dtype: torch.dtype) -> Tensor:
    """One process's loss on the joined batch; gradients are left in the model and in the loss."""
    (batch,) = train_batches(1, size=batch_size)
    ground, aerial = model(preprocess(batch.ground).to(dtype), preprocess(batch.aerial).to(dtype))
    value = loss(ground, aerial, location_m=batch.location_m)
    value.backward()
    return value.detach()


def _ddp_step(model: torch.nn.Module, loss: Loss, batch_size: int, dtype: torch.dtype) -> Tensor:
    """This rank's part of the same step under DDP."""
    world = current_world()
    (batch,) = train_batches(1, size=batch_size, rank=world.rank, world=world.size)
    ground, aerial = model(preprocess(batch.ground).to(dtype), preprocess(batch.aerial).to(dtype))
    location_m = gather(batch.location_m)
    value = loss(gather_with_gradient(ground), gather_with_gradient(aerial), location_m=location_m)
    value.backward()
    return value.detach()


def _check_steps() -> None:
    for config in LOSSES:
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-10)):
            alone = TinyModel(dtype=dtype)
            together = wrap_ddp(copy.deepcopy(alone))
            assert isinstance(together, DistributedDataParallel)
            one_loss, loss = build_loss(config), build_loss(config)
            expected = _joined_step(alone, one_loss, 16, dtype)
            torch.testing.assert_close(_ddp_step(together, loss, 16, dtype), expected, rtol=tolerance, atol=0)
            ours = itertools.chain(unwrap(together).parameters(), loss.parameters())
            for mine, theirs in zip(itertools.chain(alone.parameters(), one_loss.parameters()), ours, strict=True):
                assert mine.grad.abs().max() > 1e-2
                assert (mine.grad - theirs.grad).abs().max() <= tolerance * mine.grad.abs().max()


def _count_bucket(counted: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average as DDP does, and count."""
    counted.append(bucket.index())
    average = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return average.then(lambda done: done.value()[0] / current_world().size)


def _check_steps_in_chunks_with_dropout() -> None:
    """Dropout, chunks, the mask and the temperature at once: what one process computes in one pass."""
    world = current_world()
    (whole,) = train_batches(1, size=16)
    (mine,) = train_batches(1, size=16, rank=world.rank, world=world.size)
    for config in LOSSES:
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-10)):
            forward = Forward(preprocess=lambda pixels, to=dtype: preprocess(pixels).to(to), seed=1, step=2)
            alone = TinyModel(dropout=0.25, dtype=dtype)
            together = wrap_ddp(copy.deepcopy(alone))
            counted: list[int] = []
            together.register_comm_hook(counted, _count_bucket)
            one_loss, loss = build_loss(config), build_loss(config)
            expected = one_loss(*forward(alone, whole, slice(0, 16)), location_m=whole.location_m)
            expected.backward()
            for repetition in (1, 2):
                together.zero_grad()
                loss.zero_grad()
                found = compute_gradients(together, mine, forward=replace(forward, chunk_size=3), loss=loss)
                assert counted == [0] * repetition  # the gradients travel once a step, after the last chunk
            torch.testing.assert_close(found, expected.detach(), rtol=tolerance, atol=0)
            for ones, others in ((alone, unwrap(together)), (one_loss, loss)):
                gradients = [
                    (one.grad, other.grad) for one, other in zip(ones.parameters(), others.parameters(), strict=True)
                ]
                # Of the module's largest: a bias's gradient is a small sum of large terms of both signs.
                largest = max((one.abs().max() for one, _ in gradients), default=0)
                assert all((one - other).abs().max() <= tolerance * largest for one, other in gradients)


def _check_gather() -> None:
    world = current_world()
    rows = torch.arange(6 * world.size * 2).reshape(-1, 2)
    assert torch.equal(gather(rows[world.rank :: world.size]), rows)
    assert torch.equal(gather(rows[world.rank :: world.size, 0]), rows[:, 0])


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
    _check_steps_in_chunks_with_dropout()
    _check_train_and_evaluate()


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes_equal_one_on_the_joined_batch(world_size):
    run_distributed(_check_all, world_size)


def _fail_on_rank_one() -> None:
    assert current_world().rank == 0, "the second rank is not the first"
    time.sleep(60)  # the first one is busy; it is ended when the second fails


def test_a_failing_rank_shows_its_traceback():
    with pytest.raises(Exception, match="the second rank is not the first"):
        run_distributed(_fail_on_rank_one, 2)
