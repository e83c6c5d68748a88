"""A process that uses a cache of shards, for test_cache.py: FOLDER LIMIT_BYTES STORE SHARD_JSON HOW.

HOW is `slow` (takes a second to fetch), `hold` (keeps the shard mapped until its standard input ends) or `hang` (stops
in the middle of fetching). Prints one line of JSON once it is there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.cache import ShardCache
from pipeline.manifest import ShardInfo
from pipeline.storage import Store


class SlowStore:
    def __init__(self, store: Store, how: str) -> None:
        self._store = store
        self._how = how

    def uri(self, path: str) -> str:
        return self._store.uri(path)

    @contextmanager
    def open_input(self, path: str) -> Iterator[Any]:
        with self._store.open_input(path) as stream:
            yield SlowStream(stream, self._how)


class SlowStream:
    def __init__(self, stream: Any, how: str) -> None:
        self._stream = stream
        self._how = how
        self._num_reads = 0

    def read(self, num_bytes: int) -> bytes:
        self._num_reads += 1
        if self._how == "slow":
            time.sleep(0.3)
        if self._how == "hang" and self._num_reads == 3:
            tell({"halfway": True})
            time.sleep(600)
        return self._stream.read(min(num_bytes, 8192))


def tell(content: dict[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(content)}\n")
    sys.stdout.flush()


def main() -> None:
    folder, limit, uri, shard, how = sys.argv[1:]
    cache = ShardCache(Path(folder), limit_bytes=int(limit) or None)
    mapped = cache.open(SlowStore(Store.from_uri(uri), how), ShardInfo(**json.loads(shard)))
    tell({**asdict(cache.stats), "first": mapped.data[0]})
    if how == "hold":
        sys.stdin.read()


if __name__ == "__main__":
    main()
