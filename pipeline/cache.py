"""Copies of remote shards on this node, shared by all its processes and by runs that follow each other.

    <folder>/<blake3>.tar    a whole shard, verified once; whoever reads it holds a shared lock on it
    <folder>/<blake3>.part   a shard on its way in; whoever fetches it holds the exclusive lock
    <folder>/lock            held while room is made and while names change

All locks are `flock`s, which end with the process that holds them. So a `.part` that nobody has locked was left by a
dead process: it is removed and never read. A `.tar` that somebody has locked is in use and is not evicted.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from blake3 import blake3

from cvft.errors import ConfigError, ShardError, StoreError
from pipeline.background import BackgroundThreads
from pipeline.manifest import ShardInfo
from pipeline.patience import patiently
from pipeline.storage import Store

_COPY_BYTES = 8 * 1024 * 1024
_NUM_FETCHES = 4  # shards fetched at a time
_LOCK_INTERVAL_S = 0.02
_NUM_TRIES = 2  # of fetching a shard whose bytes arrive wrong
_GB = 1e9
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MappedShard:
    """A shard in memory, as far as it is read; the lock on its file lasts as long as the map.

    Attributes:
        data: All its bytes.
        inode: Number of its file, which tells a file from another one of the same name.
    """

    data: memoryview
    inode: int


@dataclass(kw_only=True)
class CacheStats:
    """What a cache did for this process.

    Attributes:
        num_hits: Shards that were there.
        num_misses: Shards fetched from the store.
        num_bytes: Bytes of those.
        num_evictions: Shards removed to make room.
        num_dropped: Damaged shards that were fetched again.
    """

    num_hits: int = 0
    num_misses: int = 0
    num_bytes: int = 0
    num_evictions: int = 0
    num_dropped: int = 0

    def __str__(self) -> str:
        """Return it in words."""
        return (
            f"{self.num_hits} shards were there, {self.num_misses} fetched ({_gb(self.num_bytes)}), "
            f"{self.num_evictions} evicted, {self.num_dropped} damaged ones replaced"
        )


class ShardCache:
    """A folder of shards, see the module.

    Attributes:
        stats: Counts since this object was made.
    """

    def __init__(self, folder: Path | None = None, *, limit_bytes: int | None = None, patience_s: float = 0.0) -> None:
        """Prepare to keep shards.

        Args:
            folder: Where; none is `default_cache()`.
            limit_bytes: What it may grow to; none is as far as the disk goes.
            patience_s: How long a store may be away while a shard is fetched, see `patiently`.
        """
        self.stats = CacheStats()
        self._folder = folder or default_cache()
        self._limit_bytes = limit_bytes
        self._patience_s = patience_s
        self._claimed: dict[str, int] = {}
        self._counting = threading.Lock()
        self._threads = BackgroundThreads(_NUM_FETCHES, name="fetch")

    def claim(self, shards: Iterable[ShardInfo]) -> None:
        """Announce shards that will be in use at the same time, besides those announced before.

        Raises:
            ConfigError: The cache may not grow to hold them all.
        """
        self._claimed |= {shard.blake3: shard.num_bytes for shard in shards}
        needed = sum(self._claimed.values())
        if self._limit_bytes is not None and needed > self._limit_bytes:
            raise ConfigError(
                f"data.cache_gb: {_gb(self._limit_bytes)} cannot hold the {_gb(needed)} of shards that are used at "
                f"the same time; allow {_gb(needed)} or more, or set it to null"
            )

    def open(self, store: Store, shard: ShardInfo) -> MappedShard:
        """Map a shard, after fetching it unless it is there; waits if another process is fetching it.

        Raises:
            ShardError: The store's shard is not the one that the manifest describes.
            StoreError: The store cannot be read, or this folder cannot hold the shard.
        """
        has_fetched = False
        try:
            while (mapped := self._map(store, shard)) is None:
                has_fetched |= patiently(lambda: self._fetch(store, shard), patience_s=self._patience_s)
        except OSError as error:
            reason = error.strerror or str(error)
            raise StoreError(f"{self._folder}: cannot keep {shard.name} in this cache: {reason}") from error
        self._count("num_misses" if has_fetched else "num_hits")
        return mapped

    def open_later(self, store: Store, shard: ShardInfo) -> Future[MappedShard]:
        """Do the same in the background, after what was asked for before."""
        return self._threads.submit(self.open, store, shard)

    def touch(self, shard: ShardInfo) -> None:
        """Note that a shard is in use: those used least recently are evicted first."""
        with suppress(FileNotFoundError, PermissionError):  # dropped by another process; another user's
            os.utime(self._path(shard, "tar"))

    def replace(self, store: Store, shard: ShardInfo, damaged: MappedShard) -> MappedShard:
        """Drop a shard whose bytes have changed since it was fetched, unless it was replaced already, and map it anew.

        Raises:
            ShardError: See `open`.
            StoreError: See `open`.
        """
        self._drop(store, shard, inode=damaged.inode, why="its bytes have changed")
        return self.open(store, shard)

    def _map(self, store: Store, shard: ShardInfo) -> MappedShard | None:
        path = self._path(shard, "tar")
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            return None
        with stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            if not _is_at(path, stream):
                return None  # evicted or replaced before the lock was ours
            status = os.fstat(stream.fileno())
            if status.st_size != shard.num_bytes:
                self._drop(store, shard, inode=status.st_ino, why=f"it has {status.st_size} bytes")
                return None
            self.touch(shard)
            # The map keeps a duplicate of the descriptor, and with it the lock.
            data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
            return MappedShard(data=data, inode=status.st_ino)

    def _fetch(self, store: Store, shard: ShardInfo) -> bool:
        """Bring the shard in, unless another process does it meanwhile; return whether this one did."""
        self._folder.mkdir(parents=True, exist_ok=True)
        part, target = self._path(shard, "part"), self._path(shard, "tar")
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as stream:
            if not _lock_while_at(part, stream):
                return False  # another process has finished it
            try:
                if target.exists():
                    return False
                self._reserve(stream, shard.num_bytes)
                self._copy(store, shard, stream)
                with self._names():
                    part.replace(target)
                    _sync_folder(self._folder)
                return True
            finally:
                if _is_at(part, stream):  # it failed
                    part.unlink()

    def _reserve(self, stream: IO[bytes], num_bytes: int) -> None:
        """Give the new file its length, so that other processes count it and a full disk shows at once."""
        with self._names():
            self._remove_leftovers()
            if self._limit_bytes is not None:
                self._evict_until(self._limit_bytes - num_bytes)
            os.posix_fallocate(stream.fileno(), 0, num_bytes)

    def _copy(self, store: Store, shard: ShardInfo, stream: IO[bytes]) -> None:
        for _ in range(_NUM_TRIES):
            stream.seek(0)
            content = blake3()
            num_bytes = 0
            with store.open_input(shard.name) as source:
                while num_bytes <= shard.num_bytes and (chunk := source.read(_COPY_BYTES)):
                    content.update(chunk)
                    stream.write(chunk)
                    num_bytes += len(chunk)
            if (num_bytes, content.hexdigest()) == (shard.num_bytes, shard.blake3):
                stream.truncate(num_bytes)  # an earlier try may have brought more
                os.fsync(stream.fileno())
                self._count("num_bytes", num_bytes)
                return
            _LOGGER.warning("%s: what arrived is not what the manifest describes", store.uri(shard.name))
        raise ShardError(
            f"{store.uri(shard.name)}: the store's shard is not the one that the manifest describes: {num_bytes} bytes "
            f"with blake3 {content.hexdigest()[:16]}, not {shard.num_bytes} with {shard.blake3[:16]}; run verify on it"
        )

    def _evict_until(self, limit_bytes: int) -> None:
        entries = [(status.st_mtime_ns, path, status.st_size) for path, status in self._files()]
        used = sum(size for _, _, size in entries)
        for _, path, size in sorted(entries):
            if used <= limit_bytes:
                return
            if path.suffix == ".tar" and _remove_unless_locked(path):
                used -= size
                self._count("num_evictions")
                _LOGGER.info("evicted %s (%s) from the cache of shards", path.name, _gb(size))
        if used > limit_bytes:
            raise StoreError(
                f"{self._folder}: data.cache_gb is too small: {_gb(used)} are in use by running processes, which "
                f"leaves no room for one more shard below {_gb(self._limit_bytes or 0)}"
            )

    def _remove_leftovers(self) -> None:
        for path, _ in self._files():
            if path.suffix == ".part" and _remove_unless_locked(path):
                _LOGGER.info("removed %s, which a process left behind that has ended", path.name)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                if path.suffix in (".tar", ".part"):
                    found.append((path, path.stat()))
        return found

    def _drop(self, store: Store, shard: ShardInfo, *, inode: int, why: str) -> None:
        path = self._path(shard, "tar")
        with self._names():
            try:
                if path.stat().st_ino != inode:
                    return
                path.unlink()
            except FileNotFoundError:
                return
        self._count("num_dropped")
        _LOGGER.warning("%s: its copy in the cache is damaged (%s); fetched again", store.uri(shard.name), why)

    @contextmanager
    def _names(self) -> Iterator[None]:
        with (self._folder / "lock").open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _path(self, shard: ShardInfo, suffix: str) -> Path:
        return self._folder / f"{shard.blake3}.{suffix}"

    def _count(self, name: str, number: int = 1) -> None:
        with self._counting:
            setattr(self.stats, name, getattr(self.stats, name) + number)


def default_cache() -> Path:
    """Return the folder for copies of remote shards: `$XDG_CACHE_HOME/cvft/shards`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cvft" / "shards"


def _is_at(path: Path, stream: IO[bytes]) -> bool:
    """Tell whether an open file still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _lock_while_at(path: Path, stream: IO[bytes]) -> bool:
    """Lock an open file, or return False as soon as it has lost its name."""
    while _is_at(path, stream):
        # A lock that is waited for would be waited for too long: the file of a finished part lives on as the shard, and
        # whoever maps that holds a lock on it as long as it is used.
        with suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _is_at(path, stream)
        time.sleep(_LOCK_INTERVAL_S)
    return False


def _remove_unless_locked(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, stream):
                path.unlink()
            return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / _GB:.3g} GB"
