"""The gradients of one step over the global batch, in one forward pass or in chunks that fit the memory.

In chunks, the descriptors are computed first without a graph; the loss over all of them, of every rank, gives each
descriptor's gradient; then each chunk runs forward again, with its graph, and backward from its descriptors' gradients.
The result is that of one pass, for one more forward pass. Source: Gao et al., "Scaling Deep Contrastive Learning Batch
Size under Memory Limited Setup" (RepL4NLP 2021), section 3.

Shape letters: B pairs of the global batch, W ranks, D descriptor values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cvft.augment import Augment
from cvft.batch import Batch
from cvft.config import Precision
from cvft.distributed import (
    current_world,
    gather,
    gather_with_gradient,
    num_rows_of_longest,
    unwrap,
    without_sync,
)
from cvft.loss import Loss
from cvft.noise import pair_noise

Preprocessor = Callable[[Tensor], Tensor]
"""From uint8 [B, H, W, 3] to the network's input, for either view."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How one step's pairs go through the network.

    Attributes:
        preprocess: Makes the network's input from pixels on the model's device.
        seed: Dropout is a function of (seed, step, pair), and torch is seeded from (seed, step, world rank, chunk)
            before each pass for whatever else is random in the network.
        step: Number of the step.
        chunk_size: Pairs of one forward pass of a rank; none means all of its pairs.
        precision: `bfloat16` runs the trunks' convolutions under autocast; weights, transport, descriptors and loss
            stay float32.
        augment: Changes the pixels as (seed, step, pair) decide; none leaves them as they are.
    """

    preprocess: Preprocessor
    seed: int
    step: int
    chunk_size: int | None = None
    precision: Precision = "float32"
    augment: Augment | None = None

    def __call__(self, model: nn.Module, batch: Batch, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the descriptors [rows, D] of both views."""
        words = [self.seed, self.step, current_world().rank, rows.start]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))
        noise = pair_noise(batch.index[rows], seed=self.seed, step=self.step)
        ground, aerial = batch.ground[rows], batch.aerial[rows]
        if self.augment is not None:
            ground, aerial = self.augment(ground, aerial, noise)
        ground, aerial = self.preprocess(ground), self.preprocess(aerial)
        with torch.autocast(ground.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            descriptors: tuple[Tensor, Tensor] = model(ground, aerial, noise=noise)
        return descriptors


def compute_gradients(model: nn.Module, batch: Batch, *, forward: Forward, loss: Loss) -> Tensor:
    """Add the gradients of the global batch's loss to those of the model and of the loss.

    Args:
        model: Gives (ground, aerial) descriptors of (ground, aerial, noise=); wrapped by `wrap_ddp` where there are
            several ranks.
        batch: This rank's part of the B pairs, on the model's device.
        forward: How they go through the network.
        loss: Computed on every rank over the global batch.

    Returns:
        The loss, the same on every rank.

    Raises:
        TrainingError: No negative is left.
    """
    num_pairs = len(batch.index)
    chunk_size = min(forward.chunk_size or num_pairs, num_pairs)
    chunks = [slice(start, min(start + chunk_size, num_pairs)) for start in range(0, num_pairs, chunk_size)]
    # Decided by the longest part, so that ranks with a pair more or less speak to each other in the same order.
    if forward.chunk_size is None or forward.chunk_size >= _longest_part(batch):
        value = _global_loss(loss, batch, *forward(model, batch, chunks[0]))
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()
    with torch.no_grad():
        parts = [forward(unwrap(model), batch, chunk) for chunk in chunks]
    ground, aerial = (torch.cat(part).requires_grad_() for part in zip(*parts, strict=True))
    value = _global_loss(loss, batch, ground, aerial)
    value.backward()  # type: ignore[no-untyped-call]
    for chunk in chunks[:-1]:
        with without_sync(model):
            _backward(forward(model, batch, chunk), chunk, ground, aerial)
    _backward(forward(model, batch, chunks[-1]), chunks[-1], ground, aerial)
    return value.detach()


def _longest_part(batch: Batch) -> int:
    return len(batch.index) if batch.num_global is None else num_rows_of_longest(batch.num_global, current_world())


def _global_loss(loss: Loss, batch: Batch, ground: Tensor, aerial: Tensor) -> Tensor:
    num_rows = batch.num_global
    value: Tensor = loss(
        gather_with_gradient(ground, num_rows=num_rows),
        gather_with_gradient(aerial, num_rows=num_rows),
        location_m=gather(batch.location_m, num_rows=num_rows),
    )
    return value


def _backward(descriptors: tuple[Tensor, Tensor], rows: slice, ground: Tensor, aerial: Tensor) -> None:
    gradients = [view.grad[rows] for view in (ground, aerial) if view.grad is not None]
    torch.autograd.backward(descriptors, gradients)
