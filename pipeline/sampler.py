"""Which pairs make up which batch: a pure function of seed, epoch and step, the same on any number of ranks.

A global batch has a fixed size; rank r of R takes its rows r, r + R, r + 2R, ... So an epoch's global batches do not
depend on R, every rank makes the same number of steps, and a run resumes from (epoch, step) alone. Where R does not
divide the size, the last ranks take one row less.

An epoch's order is a permutation of all rows. The first epoch over shards that still have to be fetched may ask for
`cold_permutation`, which works through the shards in windows and is just as much fixed by seed, epoch and manifest.

Shape letters: N pairs of the split, B pairs of a global batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cvft.configuration import require
from cvft.errors import ConfigError

Indices = npt.NDArray[np.int64]


def epoch_permutation(num_pairs: int, *, seed: int, epoch: int) -> Indices:
    """Return a permutation of `num_pairs` rows, int64 [N].

    The rows are sorted by raw words of the Philox counter generator keyed by (seed, epoch). Unlike numpy's own
    `permutation`, whose method may change from version to version, the raw words are fixed for good.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_pairs)
    return np.argsort(words, kind="stable").astype(np.int64)


def cold_permutation(shards: Indices, *, window: int, seed: int, epoch: int) -> Indices:
    """Return a permutation of the rows that uses up `window` shards before it touches the next ones, int64 [N].

    The shards are put in an order drawn from (seed, epoch) and cut into windows; within a window the rows are mixed as
    in `epoch_permutation`. What is in a cache plays no part, so that ranks and resumed runs agree.

    Args:
        shards: Each row's shard, int64 [N].
        window: Number of shards that are mixed.
        seed: As in `epoch_permutation`.
        epoch: As in `epoch_permutation`.
    """
    _, place = np.unique(shards, return_inverse=True)
    num_shards = int(place.max()) + 1
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(len(shards) + num_shards)
    turn = np.empty(num_shards, dtype=np.int64)
    turn[np.argsort(words[len(shards) :], kind="stable")] = np.arange(num_shards)
    return np.lexsort((words[: len(shards)], turn[place] // window)).astype(np.int64)


def check_shared(batch_size: int, *, world_size: int) -> None:
    """Refuse a global batch that leaves a rank without a pair.

    Raises:
        ConfigError: It has fewer pairs than there are ranks, or none.
    """
    require(batch_size >= 1, f"batch_size: {batch_size} must be at least 1")
    if batch_size < world_size:
        raise ConfigError(
            f"batch_size: {batch_size} pairs leave some of {world_size} ranks without any; use {world_size} or more"
        )


def check_fills(num_pairs: int, *, batch_size: int) -> None:
    """Refuse a global batch that a training epoch cannot fill once.

    Raises:
        ConfigError: It is larger than the split.
    """
    if batch_size > num_pairs:
        raise ConfigError(f"batch_size: {batch_size} exceeds the split's {num_pairs} pairs; use {num_pairs} or fewer")


def train_batches(order: Indices, *, batch_size: int, first_step: int = 0) -> Iterator[Indices]:
    """Yield an epoch's global batches from `first_step` on, int64 [B] each; the tail is dropped.

    Args:
        order: A permutation of the split's rows, int64 [N].
        batch_size: B.
        first_step: Batches to leave out at the beginning.
    """
    for step in range(first_step, len(order) // batch_size):
        yield order[step * batch_size : (step + 1) * batch_size]


def dropped_tail(order: Indices, *, batch_size: int) -> Indices:
    """Return the rows that an epoch of this order leaves out, fewer than a batch and different ones in each epoch."""
    return order[len(order) // batch_size * batch_size :]


def eval_batches(num_pairs: int, *, batch_size: int) -> Iterator[tuple[Indices, int]]:
    """Yield all rows in order as (int64 [B], number that counts); the last row is repeated to fill the last batch."""
    for start in range(0, num_pairs, batch_size):
        rows = np.arange(start, start + batch_size)
        yield np.minimum(rows, num_pairs - 1), min(batch_size, num_pairs - start)


def rank_rows(batch: Indices, *, world_rank: int, world_size: int) -> Indices:
    """Return this rank's part of a global batch."""
    return batch[world_rank::world_size]


def rank_size(batch_size: int, *, world_rank: int, world_size: int) -> int:
    """Return the number of rows of this rank's part of a global batch."""
    return max(0, -(-(batch_size - world_rank) // world_size))


def rank_num_valid(num_valid: int, *, world_rank: int, world_size: int) -> int:
    """Return how many leading rows of a rank's part are among the first `num_valid` of the global batch."""
    return rank_size(num_valid, world_rank=world_rank, world_size=world_size)
