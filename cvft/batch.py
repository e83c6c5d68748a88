"""What travels from the loader to the model: the pixels of a batch of pairs and where they come from.

Shape letters: B pairs, H rows, W columns, 3 channels in RGB order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        ground: uint8 [B, H, W, 3], RGB.
        aerial: uint8 [B, H, W, 3], RGB.
        index: int64 [B], row of each pair within its split in the manifest.
        location_m: float64 [B, 3], positions in metres whose straight distances are distances on the ground: either
            (easting, northing, 0) or earth-centred, one kind for the whole dataset; NaN where unknown.
        num_valid: Number of leading rows that count; the rest pads a last evaluation batch.
        num_global: Pairs of the global batch over all ranks, where their number is no multiple of the ranks' and some
            rank holds one pair less; none means that every rank holds as many as this one.
    """

    ground: Tensor
    aerial: Tensor
    index: Tensor
    location_m: Tensor
    num_valid: int
    num_global: int | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; pinned host memory is copied without waiting."""
        return replace(
            self,
            ground=self.ground.to(device, non_blocking=True),
            aerial=self.aerial.to(device, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            location_m=self.location_m.to(device, non_blocking=True),
        )


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on `device`; on CUDA each is copied there on a stream of its own while the one before is used.

    The copies overlap with the work only if the batches lie in pinned memory.

    Args:
        batches: Batches on the host. They are asked for on the copying stream, so that an iterator that reuses its
            memory knows by an event on the current stream when a copy is done.
        device: Where they are used; on a CPU they are passed on as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting = iter(batches)
    coming = _copy_next(waiting, device, copying)
    while coming is not None:
        batch = coming
        torch.cuda.current_stream(device).wait_stream(copying)
        for tensor in (batch.ground, batch.aerial, batch.index, batch.location_m):
            tensor.record_stream(torch.cuda.current_stream(device))  # not to be reused before the step is done with it
        coming = _copy_next(waiting, device, copying)
        yield batch


def _copy_next(batches: Iterator[Batch], device: torch.device, stream: torch.cuda.Stream) -> Batch | None:
    with torch.cuda.stream(stream):
        batch = next(batches, None)
        return None if batch is None else batch.to(device)
