"""The training and evaluation loops, in plain torch.

They run in one process, under `torchrun` and inside a Ray Train worker alike: the world is whatever torch.distributed
says it is. What a resumed training needs is the model, the loss, the optimizer and the step: the learning rate is a
function of the step, and dropout and augmentation are functions of the step and the pair.

Shape letters: B pairs of a batch, N pairs of a split, D descriptor values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cvft.augment import Augment
from cvft.batch import Batch
from cvft.config import Precision
from cvft.distributed import current_world, gather, unwrap
from cvft.errors import DataError, TrainingError
from cvft.gradients import Forward, Preprocessor, compute_gradients
from cvft.loss import Loss
from cvft.optim import clip_gradients
from cvft.pair_retrieval import rank_pairs
from cvft.retrieval import RetrievalResult


class DivergenceError(TrainingError):
    """A step whose loss or gradients are not finite; raised on every rank, with the weights as they were before it.

    Both losses are bounded on unit vectors, so that a training that explodes shows in the gradients first.

    Attributes:
        step: Number of the step.
        index: int64 [B], the pairs of the global batch.
        batch: This rank's part of it.
    """

    def __init__(self, message: str, *, step: int, index: Tensor, batch: Batch) -> None:
        super().__init__(message)
        self.step = step
        self.index = index
        self.batch = batch


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one training step did.

    Attributes:
        step: Number of the step in the whole training, counted from 0.
        loss: Loss of the global batch before the step.
        gradient_norm: Norm of the gradients over all parameters, before they were clipped.
        learning_rate: Rate of this step.
        pairs_per_s: Pairs of the global batch per second, waiting for data included.
        data_wait_s: Time until the batch was there.
        step_s: Time of the step itself.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    pairs_per_s: float
    data_wait_s: float
    step_s: float


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What one call of `train_epoch` did.

    Attributes:
        loss: Mean loss of the steps.
        num_steps: Steps done.
        seconds: Wall-clock time.
        pairs_per_s: Pairs of all ranks per second.
    """

    loss: float
    num_steps: int
    seconds: float
    pairs_per_s: float


@dataclass(frozen=True, kw_only=True)
class Descriptors:
    """Descriptors of a split in the manifest's order, on the CPU; 8 * N * D bytes for both views.

    Attributes:
        ground: float32 [N, D].
        aerial: float32 [N, D].
        index: int64 [N], 0 to N - 1.
        location_m: float64 [N, 3], NaN where unknown.
    """

    ground: Tensor
    aerial: Tensor
    index: Tensor
    location_m: Tensor


def train_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    preprocess: Preprocessor,
    loss: Loss,
    optimizer: Optimizer,
    learning_rate: Callable[[int], float],
    first_step: int,
    seed: int,
    chunk_size: int | None = None,
    max_gradient_norm: float | None = None,
    precision: Precision = "float32",
    augment: Augment | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> EpochReport:
    """Train on the given batches, one step each.

    Args:
        model: Gives (ground, aerial) descriptors [B, D] of (ground, aerial, noise=); wrapped by `wrap_ddp` where there
            are several ranks.
        batches: This rank's batches; every rank has the same number of them, and of rows too but for `num_global`.
        preprocess: Makes the network's input from pixels on the model's device.
        loss: Computed on every rank over the global batch; on the model's device.
        optimizer: Its learning rate is set at every step.
        learning_rate: Rate as a function of the step.
        first_step: Number of the first step.
        seed: Of all that is random in a step, see `Forward`; the caller's generator state is overwritten.
        chunk_size: See `Forward`.
        max_gradient_norm: Larger gradients are scaled down to it; none never does.
        precision: See `Forward`.
        augment: See `Forward`.
        on_step: Called after every step, on every rank.

    Raises:
        DivergenceError: The loss or a gradient is not finite.
        TrainingError: No negative is left, or there is no batch.
    """
    model.train()
    device = next(model.parameters()).device
    started, num_pairs = time.perf_counter(), 0
    losses: list[float] = []
    forward = Forward(
        preprocess=preprocess, seed=seed, step=first_step, chunk_size=chunk_size, precision=precision, augment=augment
    )
    for step, (batch, wait_s) in enumerate(_with_wait(batches), first_step):
        begun = time.perf_counter()
        rate = _set_rate(optimizer, learning_rate(step))
        forward = replace(forward, step=step)
        value, norm = _train_step(
            model, batch.to(device), forward=forward, loss=loss, optimizer=optimizer, max_norm=max_gradient_norm
        )
        step_s, pairs = time.perf_counter() - begun, batch.num_global or len(batch.index) * current_world().size
        num_pairs += pairs
        losses.append(value)
        if on_step is not None:
            of_step = {"loss": value, "gradient_norm": norm, "learning_rate": rate, "step_s": step_s}
            on_step(StepReport(step=step, **of_step, data_wait_s=wait_s, pairs_per_s=pairs / (wait_s + step_s)))
    return _epoch_report(losses, num_pairs, first_step=first_step, seconds=time.perf_counter() - started)


def _epoch_report(losses: list[float], num_pairs: int, *, first_step: int, seconds: float) -> EpochReport:
    if not losses:
        raise TrainingError(f"no batch to train on at step {first_step}; is the split smaller than one global batch?")
    speed = num_pairs / seconds
    return EpochReport(loss=sum(losses) / len(losses), num_steps=len(losses), seconds=seconds, pairs_per_s=speed)


def _with_wait(batches: Iterable[Batch]) -> Iterator[tuple[Batch, float]]:
    """Yield each batch with the seconds that it was waited for."""
    asked = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - asked
        asked = time.perf_counter()


def _set_rate(optimizer: Optimizer, rate: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _train_step(
    model: nn.Module, batch: Batch, *, forward: Forward, loss: Loss, optimizer: Optimizer, max_norm: float | None
) -> tuple[float, float]:
    """Return the loss and the norm of its gradients."""
    optimizer.zero_grad(set_to_none=True)
    value = compute_gradients(model, batch, forward=forward, loss=loss)
    norm = clip_gradients(optimizer, max_norm)
    # Read after the backward is queued, so that a GPU does not idle between the two, and before the weights are
    # touched.
    numbers: tuple[float, float] = (value.item(), norm.item())
    if not np.isfinite(numbers).all():
        # Every rank computed the same loss from the same descriptors and has the same averaged gradients, so all of
        # them come here.
        index = gather(batch.index, num_rows=batch.num_global)
        what = f"the loss is {numbers[0]}" if not np.isfinite(numbers[0]) else f"the gradient's norm is {numbers[1]}"
        raise DivergenceError(
            f"step {forward.step}: {what} on the pairs {index.tolist()};"
            " lower the learning rate, or look at these pairs",
            step=forward.step,
            index=index,
            batch=batch,
        )
    optimizer.step()
    loss.clamp_parameters()
    return numbers


@torch.no_grad()
def embed(
    model: nn.Module, batches: Iterable[Batch], *, preprocess: Preprocessor, num_pairs: int | None = None
) -> Descriptors:
    """Compute the descriptors of a whole split, on every rank.

    Args:
        model: Gives (ground, aerial) descriptors [B, D]; runs in evaluation mode, which is undone afterwards.
        batches: As in `train_epoch`, padding included.
        preprocess: Makes the network's input from pixels on the model's device.
        num_pairs: N, where known; then rows missing at the end are seen too.

    Raises:
        DataError: A row is missing or comes twice.
    """
    module = unwrap(model)
    device = next(module.parameters()).device
    chunks: list[tuple[Tensor, ...]] = []
    with _evaluation_mode(module):
        for batch in batches:
            moved = batch.to(device)
            ground, aerial = module(preprocess(moved.ground), preprocess(moved.aerial))
            index = moved.index.clone()
            index[batch.num_valid :] = -1
            mine = (index, ground.float(), aerial.float(), moved.location_m)
            gathered = [gather(part, num_rows=batch.num_global) for part in mine]
            is_valid = gathered[0] >= 0
            chunks.append(tuple(part[is_valid].cpu() for part in gathered))
    order, ground, aerial, location_m = _in_order(chunks, num_pairs)
    return Descriptors(index=order, ground=ground, aerial=aerial, location_m=location_m)


def _in_order(chunks: list[tuple[Tensor, ...]], num_pairs: int | None) -> list[Tensor]:
    """Put every column of the chunks in the order of the first one, which must hold 0 to N - 1 once each."""
    index = torch.cat([chunk[0] for chunk in chunks]) if chunks else torch.empty(0, dtype=torch.int64)
    counts = torch.bincount(index, minlength=num_pairs or 0)
    if len(index) == 0 or len(counts) != (num_pairs or len(counts)) or (counts != 1).any():
        wrong = {"missing": (counts == 0).nonzero()[:, 0].tolist(), "doubled": (counts > 1).nonzero()[:, 0].tolist()}
        found = ", ".join(f"{len(rows)} {kind} (first {rows[:5]})" for kind, rows in wrong.items())
        raise DataError(
            f"the evaluation batches hold {len(index)} rows of {num_pairs or len(counts)}: {found};"
            " every row of the split must come exactly once"
        )
    columns = [torch.empty(len(index), *column.shape[1:], dtype=column.dtype) for column in chunks[0]]
    for chunk in chunks:
        for column, part in zip(columns, chunk, strict=True):
            column[chunk[0]] = part
    return columns


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:  # not module.train(): a part may have been in evaluation mode before
            part.training = True


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    preprocess: Preprocessor,
    num_pairs: int | None = None,
    location: Tensor | None = None,
    num_top: int = 10,
    block: int = 1024,
) -> RetrievalResult:
    """Embed a split and rank every ground image's aerial image among all of them; every rank gets the whole result.

    Args:
        model: As in `embed`.
        batches: As in `embed`.
        preprocess: As in `embed`.
        num_pairs: As in `embed`.
        location: As in `rank_pairs`.
        num_top: Best references to list per query.
        block: Rows of a block of the ranking; bounds its memory.

    Raises:
        DataError: A row is missing or comes twice.
        TrainingError: A descriptor holds NaN or infinity.
    """
    found = embed(model, batches, preprocess=preprocess, num_pairs=num_pairs)
    return rank_pairs(found.ground, found.aerial, location=location, num_top=num_top, block=block)
