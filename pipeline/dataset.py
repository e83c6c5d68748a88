"""Random access to the pairs of one split: the manifest says where the bytes of each lie, no tar is parsed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from cvft.errors import ShardError
from pipeline.access import CachedShards, LocalShards, RangeReads, ShardBytes
from pipeline.cache import ShardCache
from pipeline.images import Rows
from pipeline.manifest import Manifest
from pipeline.schema import ROLES
from pipeline.storage import Store

PairBytes = tuple[memoryview, memoryview]
"""The ground and the aerial image's file."""
Span = tuple[int, int]


class PairDataset:
    """The pairs of one split, in the manifest's order.

    Attributes:
        keys: Key of each pair.
        location_m: float64 [N, 3], see `Manifest.location_m`.
        ground_rows_px: Rows of each pair's ground image that are used; none for all.
        is_local: Whether the shards lie on this machine.
        shards: Number of each pair's shard in `Manifest.shards`, int64 [N].
        split: The split's name.
        manifest: Where it comes from.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        cache: ShardCache | Path | None = None,
        access: Literal["mapped", "sparse"] = "mapped",
    ) -> None:
        """Prepare to read.

        Args:
            manifest: Names the store and what is in it.
            split: Which pairs.
            cache: Where copies of remote shards are kept; none is the folder `default_cache()`.
            access: `sparse` reads single pairs of a remote store by range and keeps nothing, for a look at a few of
                them; `mapped` fetches whole shards, each when it is first needed or announced by `prefetch`.

        Raises:
            ConfigError: The cache is too small for the split.
            DataError: There is no such split.
            ShardError: A shard of a local store is missing, or is not the one that the manifest describes.
        """
        pairs = manifest.split(split)
        self.manifest = manifest
        self.split = split
        self.keys: Sequence[str] = pairs["key"].to_pylist()
        self.location_m = manifest.location_m(split)
        cuts = zip(pairs["ground_first_row_px"].to_pylist(), pairs["ground_stop_row_px"].to_pylist(), strict=True)
        self.ground_rows_px: Sequence[Rows | None] = [None if first is None else (first, stop) for first, stop in cuts]
        self.shards: npt.NDArray[np.int64] = pairs["shard"].to_numpy().astype(np.int64)
        # Plain numbers: taking them out of arrow or numpy one at a time costs more than hashing an image.
        self._shard_of_row: list[int] = self.shards.tolist()
        self._spans = list(zip(*(_spans(pairs, role) for role in ROLES), strict=True))
        digests = ([int(digest, 16) for digest in pairs[f"{role}_xxh3_128"].to_pylist()] for role in ROLES)
        self._digests = list(zip(*digests, strict=True))
        store = Store.from_uri(manifest.store_uri)
        self.is_local = store.local_path("") is not None
        self._bytes = _open_shards(store, manifest, np.unique(self.shards).tolist(), cache=cache, access=access)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.keys)

    def read(self, row: int) -> PairBytes:
        """Return the original bytes of a pair's ground and aerial image; of a mapped shard, without copying them.

        A damaged copy in the cache is fetched anew.

        Raises:
            ShardError: The bytes are not those that were written (a flipped bit on the disk).
            StoreError: A remote shard cannot be read.
        """
        shard = self._shard_of_row[row]
        spans = ground, aerial = self._spans[row]
        start, stop = min(ground[0], aerial[0]), max(ground[1], aerial[1])
        data = self._bytes.read(shard, start, stop)
        images = _cut(data, spans, start)
        if self._damaged_role(row, images) is None:
            return images
        images = _cut(self._bytes.read_again(shard, start, stop, data), spans, start)
        if (role := self._damaged_role(row, images)) is not None:
            raise ShardError(
                f"{self.describe(row)}: the {role} image's bytes have changed since they were sharded; run verify"
            )
        return images

    def prefetch(self, rows: npt.NDArray[np.int64] | None = None) -> None:
        """Announce that the pairs in `rows` (none: all) will be read in this order."""
        order = self.shards if rows is None else self.shards[rows]
        _, first_use = np.unique(order, return_index=True)
        self._bytes.prefetch(order[np.sort(first_use)].tolist())

    def describe(self, row: int) -> str:
        """Name a pair for messages: its shard and its key."""
        return f"{self.manifest.shards[self._shard_of_row[row]].name}, key {self.keys[row]}"

    def _damaged_role(self, row: int, images: PairBytes) -> str | None:
        for role, image, digest in zip(ROLES, images, self._digests[row], strict=True):
            if xxhash.xxh3_128_intdigest(image) != digest:
                return role
        return None


def _spans(pairs: pa.Table, role: str) -> list[Span]:
    starts = pairs[f"{role}_offset"].to_numpy()
    stops = starts + pairs[f"{role}_bytes"].to_numpy()
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _cut(data: memoryview, spans: tuple[Span, Span], start: int) -> PairBytes:
    ground, aerial = spans
    return data[ground[0] - start : ground[1] - start], data[aerial[0] - start : aerial[1] - start]


def _open_shards(
    store: Store,
    manifest: Manifest,
    numbers: list[int],
    *,
    cache: ShardCache | Path | None,
    access: Literal["mapped", "sparse"],
) -> ShardBytes:
    if store.local_path("") is not None:
        return LocalShards(store, manifest.shards, numbers)
    if access == "sparse":
        return RangeReads(store, manifest.shards)
    shared = cache if isinstance(cache, ShardCache) else ShardCache(cache)
    return CachedShards(store, manifest.shards, numbers, cache=shared)
