"""A tiny stand-in for the network, and random batches, for tests of the loops around it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvft.batch import Batch
from cvft.noise import derive, dropout


class TinyModel(nn.Module):
    """Two linear views with dropout; knows nothing of images."""

    def __init__(self, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.ground = nn.Linear(4 * 6 * 3, 16, dtype=dtype)
        self.aerial = nn.Linear(5 * 5 * 3, 16, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ground: Tensor, aerial: Tensor, *, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if noise is not None and self.training and self.dropout.p > 0:
            ground, aerial = (
                dropout(view, self.dropout.p, derive(noise, i)) for i, view in enumerate((ground, aerial))
            )
        ground, aerial = self.ground(ground), self.aerial(aerial)
        return functional.normalize(ground, dim=1), functional.normalize(aerial, dim=1)


def preprocess(pixels: Tensor) -> Tensor:
    return pixels.flatten(1).float() / 255


def random_batch(index: Tensor, num_valid: int | None = None, num_global: int | None = None) -> Batch:
    """Make the pixels of a pair from its index alone."""
    generators = [torch.Generator().manual_seed(int(row)) for row in index]
    pixels = torch.stack([torch.randint(256, (147,), dtype=torch.uint8, generator=each) for each in generators])
    return Batch(
        ground=pixels[:, :72].reshape(-1, 4, 6, 3),
        aerial=pixels[:, 72:].reshape(-1, 5, 5, 3),
        index=index,
        location_m=torch.stack([index * 10.0, index * 0.0, index * 0.0], dim=1).double(),
        num_valid=len(index) if num_valid is None else num_valid,
        num_global=num_global,
    )


def train_batches(num_steps: int, *, first_step: int = 0, size: int = 8, rank: int = 0, world: int = 1) -> list[Batch]:
    """Make one rank's rows of the global batches from `first_step` to `num_steps`."""
    rows = [torch.arange(step * size, (step + 1) * size) for step in range(first_step, num_steps)]
    return [random_batch(index[rank::world], num_global=size) for index in rows]


def eval_batches(num_pairs: int, *, size: int = 8, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Walk through a split in order; the last batch is padded with its last row, on every rank."""
    for start in range(0, num_pairs, size):
        index = torch.arange(start, start + size)
        own = index[rank::world]
        yield random_batch(own.clamp(max=num_pairs - 1), num_valid=int((own < num_pairs).sum()), num_global=size)
