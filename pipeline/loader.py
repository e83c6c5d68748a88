"""From a dataset to batches of pixels: threads decode pairs straight into a few reused buffers, ahead of the step.

Decoding releases the interpreter's lock, so threads share one memory map and cost no copies between processes; they are
a fifth faster than as many worker processes. Normalisation is left to the device (`cvft.preprocess`), which gets a
quarter of the bytes this way.

Shape letters: b pairs of this rank's part of a global batch, H rows, W columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from cvft.batch import Batch
from cvft.config import PreprocessConfig
from cvft.configuration import require
from cvft.errors import DataError
from pipeline import sampler
from pipeline.dataset import PairDataset
from pipeline.images import decode

_NUM_AHEAD = 2  # batches being decoded while one is in use


class Loader:
    """Batches of one split for one rank.

    A yielded batch shares its pixels with a buffer that is filled again when the next batch is asked for: use it or
    copy it before that (`Batch.to` a device copies; on CUDA the loader itself waits for such copies).

    Attributes:
        num_steps: Batches of a training epoch.
    """

    def __init__(
        self,
        dataset: PairDataset,
        *,
        preprocess: PreprocessConfig,
        batch_size: int,
        world_rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        num_threads: int = 2,
    ) -> None:
        """Prepare to load.

        Args:
            dataset: The split's pairs.
            preprocess: Gives the sizes in pixels and the decode profile.
            batch_size: Pairs of a global batch, over all ranks.
            world_rank: This process's number.
            world_size: Number of processes; each gets every `world_size`-th row of a global batch.
            seed: Of the order of training epochs.
            num_threads: Decoding threads.

        Raises:
            ConfigError: The global batch is not divisible by the number of ranks, or there are no threads.
        """
        sampler.check_divisible(batch_size, world_size=world_size)
        require(num_threads >= 1, f"num_threads: {num_threads} must be at least 1")
        self.num_steps = len(dataset) // batch_size
        self._dataset = dataset
        self._preprocess = preprocess
        self._batch_size = batch_size
        self._world_rank = world_rank
        self._world_size = world_size
        self._seed = seed
        self._num_threads = num_threads
        self._location_m = torch.from_numpy(dataset.location_m)

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of a training epoch, from `first_step` on.

        Raises:
            ConfigError: The global batch is larger than the split.
            DataError: An image cannot be decoded; names its shard and key.
            ShardError: An image's bytes are damaged.
        """
        sampler.check_fills(len(self._dataset), batch_size=self._batch_size)
        batches = sampler.train_batches(
            len(self._dataset), batch_size=self._batch_size, seed=self._seed, epoch=epoch, first_step=first_step
        )
        return self._load((rows, self._batch_size) for rows in batches)

    def eval_batches(self) -> Iterator[Batch]:
        """Yield this rank's part of all pairs in the manifest's order; the last batch is padded, see `Batch.num_valid`.

        Raises:
            DataError: An image cannot be decoded; names its shard and key.
            ShardError: An image's bytes are damaged.
        """
        return self._load(sampler.eval_batches(len(self._dataset), batch_size=self._batch_size))

    def _load(self, batches: Iterable[tuple[sampler.Indices, int]]) -> Iterator[Batch]:
        rank, size = self._world_rank, self._world_size
        free = [self._new_buffer() for _ in range(_NUM_AHEAD + 1)]
        pending: deque[_Pending] = deque()
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode", initializer=_use_one_opencv_thread)
        try:
            for rows, num_valid in batches:
                part = sampler.rank_rows(rows, world_rank=rank, world_size=size)
                valid = sampler.rank_num_valid(num_valid, world_rank=rank, world_size=size)
                pending.append(self._submit(pool, free.pop(), part, valid))
                if not free:
                    yield from self._finish(pending.popleft(), free)
            while pending:
                yield from self._finish(pending.popleft(), free)
        finally:
            # Threads still write into buffers: let them end before those go.
            pool.shutdown(wait=True, cancel_futures=True)

    def _new_buffer(self) -> _Buffer:
        size = self._batch_size // self._world_size
        is_pinned = torch.cuda.is_available()
        shapes = (self._preprocess.ground_size_px, self._preprocess.aerial_size_px)
        ground, aerial = (torch.empty((size, *shape, 3), dtype=torch.uint8, pin_memory=is_pinned) for shape in shapes)
        return _Buffer(ground=ground, aerial=aerial)

    def _submit(self, pool: ThreadPoolExecutor, buffer: _Buffer, rows: sampler.Indices, num_valid: int) -> _Pending:
        if buffer.is_copied is not None:
            buffer.is_copied.synchronize()
        ground, aerial = buffer.ground.numpy(), buffer.aerial.numpy()
        futures = [
            pool.submit(self._decode_pair, int(row), ground[position], aerial[position])
            for position, row in enumerate(rows[:num_valid])
        ]
        # Padding is black, so that nothing depends on what a buffer held before.
        ground[num_valid:], aerial[num_valid:] = 0, 0
        return _Pending(buffer=buffer, futures=futures, rows=rows, num_valid=num_valid)

    def _decode_pair(self, row: int, ground: np.ndarray, aerial: np.ndarray) -> None:
        for role, data, out in zip(("ground", "aerial"), self._dataset.read(row), (ground, aerial), strict=True):
            try:
                decode(data, out, profile=self._preprocess.decode_profile)
            except DataError as error:
                raise DataError(f"{self._dataset.describe(row)}: {role} image: {error}") from None

    def _finish(self, batch: _Pending, free: list[_Buffer]) -> Iterator[Batch]:
        for future in batch.futures:
            future.result()
        index = torch.from_numpy(np.ascontiguousarray(batch.rows))
        yield Batch(
            ground=batch.buffer.ground,
            aerial=batch.buffer.aerial,
            index=index,
            location_m=self._location_m[index],
            num_valid=batch.num_valid,
        )
        free.append(batch.buffer.used())


@dataclass(frozen=True, kw_only=True)
class _Buffer:
    """Pixels of one batch, and on CUDA the event after which its copies to the device are done."""

    ground: Tensor
    aerial: Tensor
    is_copied: torch.cuda.Event | None = None

    def used(self) -> _Buffer:
        """Return the buffer marked as given back by the consumer, whose copies may still be under way."""
        if not self.ground.is_pinned():
            return self
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return _Buffer(ground=self.ground, aerial=self.aerial, is_copied=event)


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A batch being decoded."""

    buffer: _Buffer
    futures: list[Future[None]]
    rows: sampler.Indices
    num_valid: int


def _use_one_opencv_thread() -> None:
    # Our threads are the parallelism; OpenCV's own would fight them for the same cores.
    cv2.setNumThreads(1)
