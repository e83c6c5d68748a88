"""Several real processes share a cache of shards: one fetches, none reads a half, nothing in use is evicted."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from blake3 import blake3

from cvft.errors import ConfigError, ShardError, StoreError, StoreUnavailableError
from pipeline.cache import ShardCache
from pipeline.manifest import ShardInfo
from pipeline.storage import Store

ROOT = Path(__file__).parents[2]
NUM_BYTES = 40_000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.from_uri(tmp_path / "store")


@pytest.fixture
def shards(store: Store) -> list[ShardInfo]:
    found = []
    for number in range(4):
        data = bytes([number]) * NUM_BYTES
        store.write_bytes(f"shards/{number}.tar", data)
        digest = blake3(data).hexdigest()
        found.append(ShardInfo(name=f"shards/{number}.tar", num_bytes=NUM_BYTES, blake3=digest, num_pairs=1))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def start(store: Store, folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def start_process(shard: ShardInfo, how: str, *, limit_bytes: int = 0) -> subprocess.Popen[str]:
        script = [sys.executable, str(Path(__file__).with_name("cache_process.py"))]
        arguments = [str(folder), str(limit_bytes), store.uri(), json.dumps(asdict(shard)), how]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen([*script, *arguments], **pipes, text=True, env=environment))
        return started[-1]

    yield start_process
    for process in started:
        process.kill()
        process.communicate()


def reply(process: subprocess.Popen[str]) -> dict:
    return json.loads(process.stdout.readline())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"lock"}


def test_who_waits_for_a_fetch_does_not_wait_for_the_end_of_its_use(store, shards, folder):
    # Another process fetches the shard and goes on to map it before the waiting one has got any lock of its own.
    folder.mkdir()
    part, target = (folder / f"{shards[1].blake3}.{suffix}" for suffix in ("part", "tar"))
    with ThreadPoolExecutor(1) as pool, part.open("wb") as fetching:
        fcntl.flock(fetching, fcntl.LOCK_EX)
        waiting = pool.submit(ShardCache(folder).open, store, shards[1])
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        fetching.write(bytes([1]) * NUM_BYTES)
        fetching.flush()
        part.replace(target)
        fcntl.flock(fetching, fcntl.LOCK_SH)  # as a map of it does, for as long as it is used
        assert bytes(waiting.result(timeout=20).data) == bytes([1]) * NUM_BYTES


def test_shard_is_fetched_once_and_then_found(store, shards, folder):
    cache = ShardCache(folder)
    first = cache.open(store, shards[2])
    assert bytes(first.data) == bytes([2]) * NUM_BYTES
    assert cache.open(store, shards[2]).inode == first.inode
    assert (cache.stats.num_misses, cache.stats.num_hits, cache.stats.num_bytes) == (1, 1, NUM_BYTES)
    assert names(folder) == {f"{shards[2].blake3}.tar"}
    assert str(cache.stats).startswith("1 shards were there, 1 fetched (4e-05 GB)")


def test_two_processes_that_want_one_shard_fetch_it_once(shards, start):
    processes = [start(shards[0], "slow") for _ in range(3)]
    replies = [reply(process) for process in processes]
    assert sorted(found["num_misses"] for found in replies) == [0, 0, 1]
    assert [found["first"] for found in replies] == [0, 0, 0]


def test_killed_fetcher_leaves_nothing_that_is_trusted_or_stays(store, shards, folder, start, caplog):
    process = start(shards[1], "hang")
    assert reply(process) == {"halfway": True}
    assert names(folder) == {f"{shards[1].blake3}.part"}
    waiting = start(shards[1], "slow")
    process.send_signal(signal.SIGKILL)
    found = reply(waiting)
    assert (found["num_misses"], found["first"]) == (1, 1)
    assert names(folder) == {f"{shards[1].blake3}.tar"}


def test_left_half_of_another_shard_is_removed(store, shards, folder, start, caplog):
    process = start(shards[1], "hang")
    reply(process)
    cache = ShardCache(folder)
    cache.open(store, shards[0])
    assert f"{shards[1].blake3}.part" in names(folder)  # its process lives
    process.kill()
    process.wait()
    with caplog.at_level(logging.INFO):
        cache.open(store, shards[2])
    assert names(folder) == {f"{shards[0].blake3}.tar", f"{shards[2].blake3}.tar"}
    assert "removed" in caplog.text


def test_least_recently_used_shard_makes_room(store, shards, folder):
    cache = ShardCache(folder, limit_bytes=2 * NUM_BYTES)
    for number in (0, 1):
        cache.open(store, shards[number])
    os.utime(folder / f"{shards[1].blake3}.tar", ns=(1, 1))
    cache.open(store, shards[0])
    cache.open(store, shards[2])
    assert names(folder) == {f"{shards[0].blake3}.tar", f"{shards[2].blake3}.tar"}
    assert cache.stats.num_evictions == 1


def test_shard_mapped_by_another_process_is_not_evicted(store, shards, folder, start):
    holder = start(shards[0], "hold")
    reply(holder)
    os.utime(folder / f"{shards[0].blake3}.tar", ns=(1, 1))
    cache = ShardCache(folder, limit_bytes=2 * NUM_BYTES)
    for number in (1, 2, 3):
        cache.open(store, shards[number])
    assert names(folder) == {f"{shards[0].blake3}.tar", f"{shards[3].blake3}.tar"}
    assert cache.stats.num_evictions == 2
    holder.communicate()
    for number in (1, 2):
        cache.open(store, shards[number])
    assert f"{shards[0].blake3}.tar" not in names(folder)


def test_shard_mapped_by_this_process_is_not_evicted(store, shards, folder):
    cache = ShardCache(folder, limit_bytes=2 * NUM_BYTES)
    mapped = cache.open(store, shards[0])
    part = mapped.data[100:200]  # as a decoder holds it
    del mapped
    for number in (1, 2, 3):
        cache.open(store, shards[number])
    assert f"{shards[0].blake3}.tar" in names(folder)
    assert set(part) == {0}


def test_cache_full_of_what_others_use_is_told_in_one_line(store, shards, folder, start):
    reply(start(shards[0], "hold"))
    with pytest.raises(StoreError, match=r"cache_gb is too small: 4e-05 GB are in use .* below 6e-05 GB"):
        ShardCache(folder, limit_bytes=60_000).open(store, shards[1])
    assert names(folder) == {f"{shards[0].blake3}.tar"}


def test_limit_below_the_working_set_is_refused_with_both_numbers(shards, folder):
    cache = ShardCache(folder, limit_bytes=int(2.5 * NUM_BYTES))
    cache.claim(shards[:2])
    cache.claim(shards[1:2])
    with pytest.raises(ConfigError, match=r"data.cache_gb: 0.0001 GB cannot hold the 0.00012 GB of shards"):
        cache.claim(shards[2:3])
    ShardCache(folder).claim(shards)


def test_shard_that_is_not_the_manifests_is_fetched_twice_and_never_kept(store, shards, folder, caplog):
    data = bytearray(store.read_bytes(shards[0].name))
    data[1234] ^= 1
    for damaged in (bytes(data), bytes(data[:-512]), bytes(data) + b"more", b""):
        store.write_bytes(shards[0].name, damaged)
        with pytest.raises(ShardError, match=r"shards/0.tar: the store's shard is not the one that the manifest"):
            ShardCache(folder).open(store, shards[0])
        assert names(folder) == set()
    assert caplog.text.count("what arrived is not what the manifest describes") == 8


class OnceWrong:
    """A store whose first answer has something wrong with it."""

    def __init__(self, store: Store, damage: Callable[[bytes], bytes]) -> None:
        self._store = store
        self._damage = damage
        self.uri = store.uri

    def open_input(self, path: str):
        if self._damage is None:
            return self._store.open_input(path)
        self._store.write_bytes("damaged", self._damage(self._store.read_bytes(path)))
        self._damage = None
        return self._store.open_input("damaged")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:100], lambda data: data + b"x" * 9999, lambda data: b"x" + data[1:]]
)
def test_shard_damaged_on_its_way_is_fetched_once_more(store, shards, folder, damage):
    assert bytes(ShardCache(folder).open(OnceWrong(store, damage), shards[1]).data) == bytes([1]) * NUM_BYTES


@pytest.mark.parametrize("num_bytes", [0, 100, NUM_BYTES - 1, NUM_BYTES + 1])
def test_copy_of_another_length_is_dropped_and_fetched_again(store, shards, folder, num_bytes, caplog):
    folder.mkdir()
    (folder / f"{shards[3].blake3}.tar").write_bytes(bytes(num_bytes))
    cache = ShardCache(folder)
    assert set(cache.open(store, shards[3]).data) == {3}
    assert (cache.stats.num_dropped, cache.stats.num_misses) == (1, 1)
    assert f"3.tar: its copy in the cache is damaged (it has {num_bytes} bytes); fetched again" in caplog.text


def test_damaged_copy_is_replaced_once_however_many_notice(store, shards, folder, caplog):
    cache = ShardCache(folder)
    mapped = cache.open(store, shards[0])
    with (folder / f"{shards[0].blake3}.tar").open("r+b") as stream:
        stream.write(b"bad")
    assert bytes(mapped.data[:3]) == b"bad"
    fresh = [cache.replace(store, shards[0], mapped) for _ in range(3)]
    assert {found.inode for found in fresh} == {fresh[0].inode} != {mapped.inode}
    assert set(fresh[0].data) == {0}
    assert (cache.stats.num_dropped, cache.stats.num_misses) == (1, 2)
    assert "shards/0.tar: its copy in the cache is damaged (its bytes have changed)" in caplog.text


def test_missing_shard_is_the_stores_error_and_leaves_nothing(store, shards, folder):
    store.delete(shards[0].name)
    with pytest.raises(StoreError, match=r"0.tar: cannot read it"):
        ShardCache(folder).open(store, shards[0])
    assert names(folder) == set()


def test_full_disk_is_one_line_and_leaves_nothing(store, shards, folder):
    # The limit on a file's size stands for a disk without room: both fail the reservation, by EFBIG and ENOSPC.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (NUM_BYTES // 2, before[1]))
    try:
        with pytest.raises(StoreError, match=r"cache: cannot keep shards/0.tar in this cache: File too large"):
            ShardCache(folder).open(store, shards[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(folder) == set()


def test_place_that_is_no_folder_is_one_line(store, shards, folder):
    folder.write_text("a file")
    with pytest.raises(
        StoreError, match=r"cache: cannot keep shards/0.tar in this cache: (File exists|Not a directory)"
    ):
        ShardCache(folder).open(store, shards[0])


@pytest.mark.objectstore
def test_shard_is_waited_for_while_its_store_is_away(s3_uri, s3_proxy, folder, caplog):
    store, data = Store.from_uri(s3_uri), bytes(NUM_BYTES)
    store.write_bytes("shards/0.tar", data)
    shard = ShardInfo(name="shards/0.tar", num_bytes=NUM_BYTES, blake3=blake3(data).hexdigest(), num_pairs=1)
    s3_proxy.go_away()
    with pytest.raises(StoreUnavailableError, match="the server cannot be reached"):
        ShardCache(folder).open(store, shard)
    coming = ShardCache(folder, patience_s=60).open_later(store, shard)
    while "trying again" not in caplog.text:
        assert not coming.done()
    s3_proxy.come_back()
    assert coming.result().data == data
