"""Batches of a split for one rank: in training order, or in the manifest's for evaluation.

Which pairs make up which batch is `pipeline.sampler`'s; reading them is `pipeline.dataset`'s; decoding them ahead of
the step is `pipeline.decoding`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from cvft.batch import Batch
from cvft.config import PreprocessConfig
from pipeline import sampler
from pipeline.dataset import PairDataset
from pipeline.decoding import Decoder, Request
from pipeline.kept_pixels import KeptPixels


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
        cold_start_window: int | None = None,
        keep_on: torch.device | None = None,
        order: Callable[[int], sampler.Indices] | None = None,
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
            cold_start_window: Number of shards that the first epoch mixes at a time, so that training begins before all
                are fetched; none mixes all pairs from the first epoch on.
            keep_on: Device whose memory keeps the split's pixels once they are decoded; none decodes them every time.
            order: Gives the order of a training epoch, int64 [N], such as `HardNegatives.order`; none mixes all pairs.
                A first epoch with a `cold_start_window` is not asked for.

        Raises:
            ConfigError: The global batch has fewer pairs than there are ranks, there are no threads, the decode profile
                does not fit the dataset's, or the pixels to keep do not fit the memory.
        """
        sampler.check_shared(batch_size, world_size=world_size)
        self.num_steps = len(dataset) // batch_size
        self._dataset = dataset
        self._batch_size = batch_size
        self._world_rank = world_rank
        self._world_size = world_size
        self._seed = seed
        self._cold_start_window = cold_start_window
        self._order = order
        size = sampler.rank_size(batch_size, world_rank=world_rank, world_size=world_size)
        decoder = Decoder(dataset, preprocess=preprocess, size=size, num_global=batch_size, num_threads=num_threads)
        self._decoder: Decoder | KeptPixels = decoder
        if keep_on is not None:
            self._decoder = KeptPixels(
                decoder, dataset, preprocess=preprocess, size=size, num_global=batch_size, device=keep_on
            )

    @property
    def kept_bytes(self) -> int:
        """Bytes of the pixels that stay in memory once they are decoded."""
        return self._decoder.num_bytes if isinstance(self._decoder, KeptPixels) else 0

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of a training epoch, from `first_step` on.

        Raises:
            ConfigError: The global batch is larger than the split.
            DataError: An image cannot be decoded; names its shard and key.
            ShardError: An image's bytes are damaged.
            StoreError: A remote shard cannot be fetched.
        """
        sampler.check_fills(len(self._dataset), batch_size=self._batch_size)
        order = self.epoch_order(epoch)
        if isinstance(self._decoder, Decoder):
            self._dataset.prefetch(order[first_step * self._batch_size :])
        batches = sampler.train_batches(order, batch_size=self._batch_size, first_step=first_step)
        return self._load((rows, self._batch_size) for rows in batches)

    def epoch_order(self, epoch: int) -> sampler.Indices:
        """Return the order of all ranks' pairs in a training epoch, int64 [N]; the last ones may not fill a batch."""
        if epoch == 0 and self._cold_start_window is not None:
            return sampler.cold_permutation(
                self._dataset.shards, window=self._cold_start_window, seed=self._seed, epoch=epoch
            )
        if self._order is not None:
            return self._order(epoch)
        return sampler.epoch_permutation(len(self._dataset), seed=self._seed, epoch=epoch)

    def eval_batches(self) -> Iterator[Batch]:
        """Yield this rank's part of all pairs in the manifest's order; the last batch is padded, see `Batch.num_valid`.

        Raises:
            DataError: An image cannot be decoded; names its shard and key.
            ShardError: An image's bytes are damaged.
            StoreError: A remote shard cannot be fetched.
        """
        if isinstance(self._decoder, Decoder):
            self._dataset.prefetch()
        return self._load(sampler.eval_batches(len(self._dataset), batch_size=self._batch_size))

    def _load(self, batches: Iterable[tuple[sampler.Indices, int]]) -> Iterator[Batch]:
        rank, size = self._world_rank, self._world_size
        return self._decoder.batches(
            Request(
                rows=sampler.rank_rows(rows, world_rank=rank, world_size=size),
                num_valid=sampler.rank_num_valid(num_valid, world_rank=rank, world_size=size),
                read=self._dataset.read,
            )
            for rows, num_valid in batches
        )
