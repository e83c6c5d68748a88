"""Three ways to the bytes of shards: mapped where they lie, through the node's cache, or by one range read a pair."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from cvft.errors import ShardError
from pipeline.cache import MappedShard, ShardCache
from pipeline.manifest import ShardInfo
from pipeline.storage import Store


class ShardBytes(Protocol):
    """Random access to shards by their number in the manifest."""

    def read(self, number: int, start: int, stop: int) -> memoryview:
        """Return the bytes [start, stop) of a shard."""

    def read_again(self, number: int, start: int, stop: int, damaged: memoryview) -> memoryview:
        """Return them from a fresh copy, where there can be one: `damaged` is what `read` gave."""

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Announce in which order shards will be needed; those announced earlier come first."""


class LocalShards:
    """Shards of a local store, mapped into memory."""

    def __init__(self, store: Store, shards: Sequence[ShardInfo], numbers: Iterable[int]) -> None:
        """Map the shards with these numbers.

        Raises:
            ShardError: A shard is missing or has another length than the manifest says.
        """
        self._maps = {number: _map(store, shards[number]) for number in numbers}

    def read(self, number: int, start: int, stop: int) -> memoryview:
        """See `ShardBytes`."""
        return self._maps[number][start:stop]

    def read_again(self, number: int, start: int, stop: int, damaged: memoryview) -> memoryview:
        """See `ShardBytes`; there is no other copy."""
        return self._maps[number][start:stop]

    def prefetch(self, numbers: Iterable[int]) -> None:
        """See `ShardBytes`; they are all here."""


class RangeReads:
    """Shards of a remote store of which few pairs are wanted: each read is one request, nothing is kept."""

    def __init__(self, store: Store, shards: Sequence[ShardInfo]) -> None:
        self._store = store
        self._shards = shards

    def read(self, number: int, start: int, stop: int) -> memoryview:
        """See `ShardBytes`.

        Raises:
            StoreError: The store cannot be read.
        """
        return memoryview(self._store.read_range(self._shards[number].name, start, stop - start))

    def read_again(self, number: int, start: int, stop: int, damaged: memoryview) -> memoryview:
        """See `ShardBytes`."""
        return self.read(number, start, stop)

    def prefetch(self, numbers: Iterable[int]) -> None:
        """See `ShardBytes`; there is nothing to gain."""


class CachedShards:
    """Shards of a remote store, fetched into the node's cache in the background and mapped from there.

    Reading waits for its shard only, so that work begins before all are there.
    """

    def __init__(self, store: Store, shards: Sequence[ShardInfo], numbers: Iterable[int], *, cache: ShardCache) -> None:
        """Claim room for the shards with these numbers; nothing is fetched before it is asked for.

        Raises:
            ConfigError: The cache is too small for them.
        """
        cache.claim(shards[number] for number in numbers)
        self._store = store
        self._shards = shards
        self._cache = cache
        self._coming: dict[int, Future[MappedShard]] = {}
        self._mapped: dict[int, MappedShard] = {}
        self._lock = threading.Lock()

    def read(self, number: int, start: int, stop: int) -> memoryview:
        """See `ShardBytes`.

        Raises:
            ShardError: The store's shard is not the one that the manifest describes.
            StoreError: The shard cannot be fetched or kept.
        """
        mapped = self._mapped.get(number)
        if mapped is None:
            self.prefetch([number])
            mapped = self._arrived(number)
        return mapped.data[start:stop]

    def read_again(self, number: int, start: int, stop: int, damaged: memoryview) -> memoryview:
        """See `ShardBytes`; drops the cache's copy unless it was dropped since.

        Raises:
            ShardError: See `read`.
            StoreError: See `read`.
        """
        with self._lock:
            mapped = self._mapped[number]
            if mapped.data.obj is damaged.obj:
                mapped = self._mapped[number] = self._cache.replace(self._store, self._shards[number], mapped)
        return mapped.data[start:stop]

    def prefetch(self, numbers: Iterable[int]) -> None:
        """See `ShardBytes`."""
        with self._lock:
            for number in numbers:
                if number in self._mapped:
                    self._cache.touch(self._shards[number])
                elif number not in self._coming:
                    self._coming[number] = self._cache.open_later(self._store, self._shards[number])

    def _arrived(self, number: int) -> MappedShard:
        coming = self._coming.get(number)
        if coming is not None:
            coming.exception()  # waits
        with self._lock:
            if number not in self._mapped:
                self._mapped[number] = self._coming[number].result()
                del self._coming[number]  # it would keep a copy mapped that is replaced later
            return self._mapped[number]


def _map(store: Store, shard: ShardInfo) -> memoryview:
    path = Path(store.uri(shard.name))  # of a local store it is the path
    try:
        size = path.stat().st_size
        if size != shard.num_bytes:
            raise ShardError(f"{path}: has {size} bytes, the manifest says {shard.num_bytes}; shard again")
        with path.open("rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise ShardError(f"{path}: the shard is missing; shard again") from None
