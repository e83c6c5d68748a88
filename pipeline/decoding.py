"""From the bytes of pairs to batches of pixels: threads decode straight into a few reused buffers, ahead of the step.

Decoding releases the interpreter's lock, so threads share one memory map and cost no copies between processes; they are
a fifth faster than as many worker processes. Normalisation is left to the device (`cvft.preprocess`), which gets a
quarter of the bytes this way.

Shape letters: b pairs of this rank's part of a global batch, H rows, W columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from cvft.batch import Batch
from cvft.config import PreprocessConfig
from cvft.configuration import require
from cvft.errors import ConfigError, DataError
from pipeline.dataset import PairBytes, PairDataset
from pipeline.images import decode
from pipeline.profile import ShardProfile
from pipeline.sampler import Indices
from pipeline.schema import ROLES

_NUM_AHEAD = 2  # batches being decoded while one is in use
_CHUNKS_PER_THREAD = (
    2  # of a batch: a task per pair would cost more, one per thread would leave threads idle at its end
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A batch to decode.

    Attributes:
        rows: Rows of the split, int64 [b].
        num_valid: Number of leading rows that count; the others are left black.
        read: Gives the bytes of a row's images; called by the decoding threads.
    """

    rows: Indices
    num_valid: int
    read: Callable[[int], PairBytes]


class Decoder:
    """Turns requests into batches, in their order."""

    def __init__(
        self,
        dataset: PairDataset,
        *,
        preprocess: PreprocessConfig,
        size: int,
        num_threads: int,
        num_global: int | None = None,
    ) -> None:
        """Prepare to decode.

        Args:
            dataset: Gives what belongs to the rows besides their bytes.
            preprocess: Gives the sizes in pixels and the decode profile.
            size: Pairs of every request, b.
            num_threads: Decoding threads.
            num_global: Pairs of the global batch over all ranks; none means as `Batch.num_global`.

        Raises:
            ConfigError: There are no threads, or the decode profile does not fit the dataset's.
        """
        require(num_threads >= 1, f"num_threads: {num_threads} must be at least 1")
        check_profile(preprocess, dataset.manifest.profile, where=dataset.manifest.uri)
        self._dataset = dataset
        self._preprocess = preprocess
        self._size = size
        self._num_global = num_global
        self._num_threads = num_threads
        self._location_m = torch.from_numpy(dataset.location_m)

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Yield the batch of each request; its pixels are overwritten once the next one is asked for.

        Raises:
            DataError: An image cannot be decoded; names its shard and key.
            CvftError: What `Request.read` raises.
        """
        free = [self._new_buffer() for _ in range(_NUM_AHEAD + 1)]
        pending: deque[_Pending] = deque()
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode", initializer=_use_one_opencv_thread)
        try:
            for request in requests:
                pending.append(self._submit(pool, free.pop(), request))
                if not free:
                    yield from self._finish(pending.popleft(), free)
            while pending:
                yield from self._finish(pending.popleft(), free)
        finally:
            # Threads still write into buffers: let them end before those go.
            pool.shutdown(wait=True, cancel_futures=True)

    def _new_buffer(self) -> _Buffer:
        is_pinned = torch.cuda.is_available()
        shapes = (self._preprocess.ground_size_px, self._preprocess.aerial_size_px)
        ground, aerial = (
            torch.empty((self._size, *shape, 3), dtype=torch.uint8, pin_memory=is_pinned) for shape in shapes
        )
        return _Buffer(ground=ground, aerial=aerial)

    def _submit(self, pool: ThreadPoolExecutor, buffer: _Buffer, request: Request) -> _Pending:
        if buffer.is_copied is not None:
            buffer.is_copied.synchronize()
        views = buffer.ground.numpy(), buffer.aerial.numpy()
        step = max(1, -(-request.num_valid // (self._num_threads * _CHUNKS_PER_THREAD)))
        futures = [
            pool.submit(self._decode_pairs, request, views, range(start, min(start + step, request.num_valid)))
            for start in range(0, request.num_valid, step)
        ]
        # Padding is black, so that nothing depends on what a buffer held before.
        for view in views:
            view[request.num_valid :] = 0
        return _Pending(buffer=buffer, futures=futures, request=request)

    def _decode_pairs(self, request: Request, views: tuple[np.ndarray, np.ndarray], places: range) -> None:
        profile = self._preprocess.decode_profile
        for place in places:
            row = int(request.rows[place])
            rows_px = (self._dataset.ground_rows_px[row], None)
            for role, data, view, used in zip(ROLES, request.read(row), views, rows_px, strict=True):
                try:
                    decode(data, view[place], profile=profile, rows_px=used)
                except DataError as error:
                    raise DataError(f"{self._dataset.describe(row)}: {role} image: {error}") from None

    def _finish(self, batch: _Pending, free: list[_Buffer]) -> Iterator[Batch]:
        for future in batch.futures:
            future.result()
        index = torch.from_numpy(np.ascontiguousarray(batch.request.rows))
        yield Batch(
            ground=batch.buffer.ground,
            aerial=batch.buffer.aerial,
            index=index,
            location_m=self._location_m[index],
            num_valid=batch.request.num_valid,
            num_global=self._num_global,
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
    request: Request


def check_profile(preprocess: PreprocessConfig, profile: ShardProfile, *, where: str) -> None:
    """Refuse to decode images otherwise than their dataset was made for.

    Raises:
        ConfigError: `preresized` is asked of original images or of other sizes, or another profile of preresized ones.
    """
    wants_preresized = preprocess.decode_profile == "preresized"
    sizes = (preprocess.ground_size_px, preprocess.aerial_size_px)
    if wants_preresized == (profile.name == "preresized") and (
        not wants_preresized or sizes == (profile.ground_size_px, profile.aerial_size_px)
    ):
        return
    ground, aerial = ("x".join(map(str, size)) for size in sizes)
    raise ConfigError(
        f"preprocess.decode_profile: {preprocess.decode_profile} (ground {ground}, aerial {aerial}) does not fit "
        f"{where}, whose images are {profile}; change preprocess.* or shard with the other --profile"
    )


def _use_one_opencv_thread() -> None:
    # Our threads are the parallelism; OpenCV's own would fight them for the same cores.
    cv2.setNumThreads(1)
