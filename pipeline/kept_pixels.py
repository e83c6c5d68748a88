"""Pixels that stay in memory: each pair of a split is decoded once, and every batch is gathered from there.

For a split that is small beside the memory of the machine or of the GPU: a training that reads it many times is then
never held up by decoding. Every rank keeps the whole split, because any pair may come to any rank.

Shape letters: N pairs of the split, b pairs of this rank's part of a global batch, H rows, W columns.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cvft.batch import Batch
from cvft.config import PreprocessConfig
from cvft.errors import ConfigError
from pipeline.dataset import PairDataset
from pipeline.decoding import Decoder, Request
from pipeline.sampler import Indices

_MEMORY_TABLE = Path("/proc/meminfo")
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Table:
    """All pixels of a split: uint8 [N, H, W, 3] of both views, and the places, float64 [N, 3], on the host."""

    ground: Tensor
    aerial: Tensor
    location_m: Tensor


class KeptPixels:
    """Turns requests into batches as a `Decoder` does, decoding each pair at most once."""

    def __init__(
        self,
        decoder: Decoder,
        dataset: PairDataset,
        *,
        preprocess: PreprocessConfig,
        size: int,
        num_global: int,
        device: torch.device,
    ) -> None:
        """Prepare; nothing is decoded before the first batch is asked for.

        Args:
            decoder: Decodes requests of `size` pairs.
            dataset: The split.
            preprocess: Gives the sizes in pixels.
            size: Pairs of every request, b.
            num_global: See `Batch.num_global`.
            device: Where the pixels stay: the CPU, or the GPU that trains.

        Raises:
            ConfigError: The split's pixels do not fit into the memory that is free.
        """
        self._decoder = decoder
        self._dataset = dataset
        self._shapes = preprocess.ground_size_px, preprocess.aerial_size_px
        self._size = size
        self._num_global = num_global
        self._device = device
        self._table: _Table | None = None
        self.num_bytes = len(dataset) * sum(3 * math.prod(shape) for shape in self._shapes)
        require_room(self.num_bytes, device, what=f"the {len(dataset):,} pairs of split {dataset.split!r}")

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Yield the batch of each request, on the device that keeps the pixels.

        Raises:
            DataError: An image cannot be decoded; names its shard and key.
            CvftError: An image's bytes cannot be read.
        """
        if self._table is None:
            self._table = self._decode_all()
        for request in requests:
            yield self._gather(self._table, request)

    def _decode_all(self) -> _Table:
        started, number = time.monotonic(), len(self._dataset)
        ground, aerial = (
            torch.empty((number, *shape, 3), dtype=torch.uint8, device=self._device) for shape in self._shapes
        )
        location_m = torch.from_numpy(self._dataset.location_m)
        self._dataset.prefetch()
        for batch in self._decoder.batches(self._all_rows()):
            rows = slice(int(batch.index[0]), int(batch.index[0]) + batch.num_valid)
            ground[rows] = batch.ground[: batch.num_valid].to(self._device)
            aerial[rows] = batch.aerial[: batch.num_valid].to(self._device)
        _LOGGER.info(
            "the pixels of %s pairs of split %s stay in memory: %.2f GB, decoded in %.1f s",
            f"{number:,}",
            self._dataset.split,
            self.num_bytes / 1e9,
            time.monotonic() - started,
        )
        return _Table(ground=ground, aerial=aerial, location_m=location_m)

    def _all_rows(self) -> Iterator[Request]:
        number = len(self._dataset)
        for start in range(0, number, self._size):
            rows: Indices = np.minimum(np.arange(start, start + self._size), number - 1)
            yield Request(rows=rows, num_valid=min(self._size, number - start), read=self._dataset.read)

    def _gather(self, table: _Table, request: Request) -> Batch:
        index = torch.from_numpy(np.ascontiguousarray(request.rows))
        rows = index.to(self._device)
        ground, aerial = (self._take(pixels, rows, request.num_valid) for pixels in (table.ground, table.aerial))
        return Batch(
            ground=ground,
            aerial=aerial,
            index=index,
            location_m=table.location_m[index],
            num_valid=request.num_valid,
            num_global=self._num_global,
        )

    def _take(self, pixels: Tensor, rows: Tensor, num_valid: int) -> Tensor:
        # Pinned on the host, so that the copy to a GPU overlaps with the step before.
        is_pinned = pixels.device.type == "cpu" and torch.cuda.is_available()
        taken = torch.empty(
            (len(rows), *pixels.shape[1:]), dtype=pixels.dtype, device=self._device, pin_memory=is_pinned
        )
        torch.index_select(pixels, 0, rows, out=taken)
        taken[num_valid:] = 0  # padding is black, as a decoder leaves it
        return taken


def require_room(num_bytes: int, device: torch.device, *, what: str) -> None:
    """Refuse to keep more than fits into what is free of a device's memory.

    Raises:
        ConfigError: It does not fit.
    """
    free = free_bytes(device)
    if free is not None and num_bytes > free:
        raise ConfigError(
            f"data.keep_pixels: {what} take {num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB of {device.type} memory "
            "are free; set it to never"
        )


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be had of a device's memory; None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not _MEMORY_TABLE.exists():  # only Linux has it
        return None
    lines = dict(line.split(":", 1) for line in _MEMORY_TABLE.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
