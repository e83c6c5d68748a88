"""Random access to the pairs of one split: the manifest's offsets into memory-mapped tars, no tar is parsed.

Shards of a remote store are copied once into a cache on this node, named by their blake3 and verified on the way in.
"""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from blake3 import blake3

from cvft.errors import ShardError, StoreError
from pipeline.manifest import Manifest, ShardInfo
from pipeline.storage import Store

_COPY_BYTES = 8 * 1024 * 1024
_NUM_COPIES = 4  # shards fetched at a time


class PairDataset:
    """The pairs of one split, in the manifest's order.

    Attributes:
        keys: Key of each pair.
        location_m: float64 [N, 3], see `Manifest.location_m`.
        split: The split's name.
        manifest: Where it comes from.
    """

    def __init__(self, manifest: Manifest, split: str, *, cache: Path | None = None) -> None:
        """Map the split's shards, after copying remote ones to `cache` (none: `default_cache()`).

        Raises:
            DataError: There is no such split.
            ShardError: A shard is missing, or is not the one that the manifest describes.
            StoreError: A remote shard cannot be read.
        """
        pairs = manifest.split(split)
        self.manifest = manifest
        self.split = split
        self.keys: Sequence[str] = pairs["key"].to_pylist()
        self.location_m = manifest.location_m(split)
        self._shard = pairs["shard"].to_numpy()
        self._spans = {role: _Spans(pairs, role) for role in ("ground", "aerial")}
        store = Store.from_uri(manifest.store_uri)
        folder = cache or default_cache()

        def open_shard(number: int) -> memoryview:
            shard = manifest.shards[number]
            return _map_shard(_local_file(store, shard, folder), shard)

        numbers = np.unique(self._shard).tolist()
        with ThreadPoolExecutor(_NUM_COPIES) as pool:
            self._maps: dict[int, memoryview] = dict(zip(numbers, pool.map(open_shard, numbers), strict=True))

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.keys)

    def read(self, row: int) -> tuple[memoryview, memoryview]:
        """Return the original bytes of a pair's ground and aerial image, without copying them.

        Raises:
            ShardError: The bytes are not those that were written (a flipped bit on the disk).
        """
        return self._read_image(row, "ground"), self._read_image(row, "aerial")

    def describe(self, row: int) -> str:
        """Name a pair for messages: its shard and its key."""
        return f"{self.manifest.shards[self._shard[row]].name}, key {self.keys[row]}"

    def _read_image(self, row: int, role: str) -> memoryview:
        spans = self._spans[role]
        start = int(spans.offset[row])
        data: memoryview = self._maps[int(self._shard[row])][start : start + int(spans.num_bytes[row])]
        if xxhash.xxh3_128_hexdigest(data) != spans.xxh3_128[row]:
            raise ShardError(f"{self.describe(row)}: the {role} image's bytes have changed since they were sharded")
        return data


class _Spans:
    """Where the images of one role lie within their shards."""

    def __init__(self, pairs: pa.Table, role: str) -> None:
        self.offset: npt.NDArray[np.int64] = pairs[f"{role}_offset"].to_numpy()
        self.num_bytes: npt.NDArray[np.int64] = pairs[f"{role}_bytes"].to_numpy()
        self.xxh3_128: Sequence[str] = pairs[f"{role}_xxh3_128"].to_pylist()


def default_cache() -> Path:
    """Return the folder for copies of remote shards: `$XDG_CACHE_HOME/cvft/shards`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cvft" / "shards"


def _local_file(store: Store, shard: ShardInfo, cache: Path) -> Path:
    local = store.local_path(shard.name)
    if local is not None:
        return local
    target = cache / f"{shard.blake3}.tar"
    # A file gets this name only after its digest was verified. Ranks of one node may copy it at the same time: the last
    # rename wins, and all copies are equal.
    if not target.exists():
        _fetch(store, shard, target)
    return target


def _fetch(store: Store, shard: ShardInfo, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    content = blake3()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with store.open_input(shard.name) as source, temporary.open("wb") as stream:
            while chunk := source.read(_COPY_BYTES):
                content.update(chunk)
                stream.write(chunk)
        if content.hexdigest() != shard.blake3:
            raise ShardError(f"{store.uri(shard.name)}: its blake3 is not the manifest's; shard again")
        temporary.replace(target)
    except OSError as error:
        raise StoreError(f"{target}: cannot keep a copy of the shard here: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _map_shard(path: Path, shard: ShardInfo) -> memoryview:
    try:
        size = path.stat().st_size
        if size != shard.num_bytes:
            raise ShardError(f"{path}: has {size} bytes, the manifest says {shard.num_bytes}; shard again")
        with path.open("rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise ShardError(f"{path}: the shard is missing; shard again") from None
