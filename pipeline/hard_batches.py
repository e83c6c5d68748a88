"""An epoch of batches of pairs that are hard to tell apart: a pure function of seed, epoch and a table of neighbours.

A batch is filled with groups: a pair, drawn at random, and pairs out of its pool (its nearest neighbours that no batch
of the epoch has yet), half of them the nearest and half drawn from the rest. Source: Deuser et al., Sample4Geo (ICCV
2023). When the batch is full the next one begins with another group. As the pools run out towards the end of an epoch,
groups become smaller; the full batches are therefore put in a random order.

No batch holds two pairs of one place. Pairs that find no batch on the way, because their place is in all that are left,
change places with others at the end, so that every batch is filled whenever that can be done.

Shape letters: N pairs of the split, K neighbours in a pool, B pairs of a global batch, S batches of an epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cvft.errors import ConfigError
from pipeline.sampler import Indices

_ODD = np.uint64(0x9E3779B97F4A7C15)


def grouped_permutation(
    table: npt.NDArray[np.int32], *, place: Indices, batch_size: int, num_hard: int, seed: int, epoch: int
) -> Indices:
    """Return a permutation of the rows whose batches of `batch_size` are hard, int64 [N].

    The rows after the last whole batch are those that `epoch_permutation` would leave out as well, unless pairs of one
    place have to change with them.

    Args:
        table: Each row's neighbours, nearest first, int32 [N, K]; -1 where there are fewer.
        place: Rows with the same number never share a batch, int64 [N] from 0 on.
        batch_size: B.
        num_hard: Neighbours to take for a pair at most.
        seed: As in `epoch_permutation`.
        epoch: As in `epoch_permutation`.

    Raises:
        ConfigError: There are not enough places to fill every batch with different ones.
    """
    num_pairs, num_batches = len(table), len(table) // batch_size
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_pairs + num_batches)
    order = np.argsort(words[:num_pairs], kind="stable")
    kept = num_batches * batch_size
    filler = _Filler(table, order[:kept], place=place, words=words, num_hard=num_hard)
    batches = [filler.batch(number, batch_size) for number in range(num_batches)]
    unused = [*filler.unused(), *order[kept:].tolist()]
    if any(len(batch) < batch_size for batch in batches):
        unused = _complete(batches, unused, place=place, batch_size=batch_size)
    turn = np.argsort(words[num_pairs:], kind="stable").tolist()
    return np.array([row for number in turn for row in batches[number]] + unused, dtype=np.int64)


class _Filler:
    """Fills one batch after another; knows which rows are still free and in which batch a place was seen last."""

    def __init__(
        self,
        table: npt.NDArray[np.int32],
        order: Indices,
        *,
        place: Indices,
        words: npt.NDArray[np.uint64],
        num_hard: int,
    ) -> None:
        self._table = table
        self._order = order
        self._place = place
        self._words = words
        self._num_hard = num_hard
        self._are_places_shared = len(np.unique(place)) < len(place)
        self._is_free = np.zeros(len(table) + 1, dtype=np.bool_)  # the last one answers for neighbour -1
        self._is_free[order] = True
        self._seen_in = np.full(int(place.max(initial=0)) + 1, -1, dtype=np.int64)
        self._coming: Iterator[int] = iter(order.tolist())
        self._waiting: deque[int] = deque()  # rows that came up while their place was in the batch

    def batch(self, number: int, batch_size: int) -> list[int]:
        """Return the rows of a batch; fewer than `batch_size` if all free rows are of places that it has."""
        rows: list[int] = []
        num_retries = len(self._waiting)
        while len(rows) < batch_size:
            first = None
            while first is None and num_retries:
                num_retries -= 1
                first = self._admit(self._waiting.popleft(), number)
            while first is None and (row := next(self._coming, None)) is not None:
                first = self._admit(row, number)
            if first is None:
                break
            self._take(np.array([first]), number)
            rows.append(first)
            rows.extend(self._take_hard(first, number, min(self._num_hard, batch_size - len(rows))))
        return rows

    def unused(self) -> list[int]:
        """Return the rows that no batch has, in the order in which they came up."""
        return [row for row in self._order.tolist() if self._is_free[row]]

    def _admit(self, row: int, number: int) -> int | None:
        """Return the row if it may begin a group; let it wait if only its place forbids it."""
        if not self._is_free[row]:
            return None
        if self._seen_in[self._place[row]] == number:
            self._waiting.append(row)
            return None
        return row

    def _take_hard(self, first: int, number: int, room: int) -> list[int]:
        pool = self._table[first]
        pool = pool[self._is_free[pool]]
        if self._are_places_shared:
            pool = pool[self._seen_in[self._place[pool]] != number]
            pool = pool[np.sort(np.unique(self._place[pool], return_index=True)[1])]
        if len(pool) > room:
            num_nearest = room - room // 2
            rest = pool[num_nearest:]
            lots = (
                self._words[rest] ^ self._words[first]
            ) * _ODD  # the xor alone would keep neighbours in lots together
            pool = np.concatenate([pool[:num_nearest], rest[np.argsort(lots, kind="stable")[: room - num_nearest]]])
        self._take(pool, number)
        rows: list[int] = pool.tolist()
        return rows

    def _take(self, rows: npt.NDArray[np.integer], number: int) -> None:
        self._is_free[rows] = False
        self._seen_in[self._place[rows]] = number


def _complete(batches: list[list[int]], unused: list[int], *, place: Indices, batch_size: int) -> list[int]:
    """Fill the batches that are short, in place, and return the rows that are left over.

    A row whose place is in the short batch already takes the seat of another in a full batch that lacks its place; that
    batch has more places than the short one, so one of its rows can move there. Only a place that all batches have
    cannot go on; so the batches stay short only if no other choice would fill them.
    """
    places = [set(place[batch].tolist()) for batch in batches]
    waiting, left = deque(unused), list[int]()
    for short, batch in enumerate(batches):
        while len(batch) < batch_size:
            if not waiting:
                raise _too_few_places(place, num_batches=len(batches), batch_size=batch_size)
            row = waiting.popleft()
            target = next((at for at in (short, *range(len(batches))) if int(place[row]) not in places[at]), None)
            if target is None:
                left.append(row)
                continue
            if len(batches[target]) == batch_size:
                seat = next(
                    seat for seat, other in enumerate(batches[target]) if int(place[other]) not in places[short]
                )
                moved, batches[target][seat] = batches[target][seat], row
                places[target] ^= {int(place[row]), int(place[moved])}
                row, target = moved, short
            batches[target].append(row)
            places[target].add(int(place[row]))
    return left + list(waiting)


def _too_few_places(place: Indices, *, num_batches: int, batch_size: int) -> ConfigError:
    counts = np.bincount(place)
    return ConfigError(
        f"train.sampling: {num_batches} batches of {batch_size} pairs of different places cannot be made of"
        f" {len(place)} pairs of {np.count_nonzero(counts)} places, one of which has {counts.max()} pairs;"
        " use a smaller train.batch_size or train.sampling.min_distance_m"
    )
