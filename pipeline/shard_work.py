"""The shards of one plan: those an earlier run finished are found, the others are written by tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa

from cvft.errors import ShardError
from pipeline.manifest import PAIR_SCHEMA
from pipeline.plan import Plan
from pipeline.pointer import read_pointer
from pipeline.runner import Runner
from pipeline.shards import ShardEntry, ShardSpec, read_entry, write_shard
from pipeline.storage import Store

_NUM_READERS = 8
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """How far the writing of shards is.

    Attributes:
        num_pairs: Pairs of the plan.
        num_pairs_done: Pairs in finished shards.
        num_pairs_found: Those of them that an earlier run finished.
        num_shards: Shards of the plan.
        num_shards_done: Finished shards.
        num_bytes_written: Bytes written by this run.
        num_retries: Tasks tried again.
    """

    num_pairs: int
    num_pairs_done: int
    num_pairs_found: int
    num_shards: int
    num_shards_done: int
    num_bytes_written: int
    num_retries: int


class ShardWork:
    """Makes the shards of a plan be there.

    Attributes:
        num_written: Shards written by this run so far.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        runner: Runner,
        *,
        skip_unusable: bool,
        progress: Callable[[BuildProgress], None] | None,
    ) -> None:
        self.num_written = 0
        self._store = store
        self._plan = plan
        self._skip_unusable = skip_unusable
        self._runner = runner
        self._progress = progress
        self._entries: dict[str, ShardEntry] = {}
        self._num_pairs = sum(len(spec.pairs) for spec in plan.specs)
        self._num_pairs_done = self._num_pairs_found = self._num_bytes_written = 0

    def run(self) -> list[ShardEntry]:
        """Write the shards that are missing; return all entries in the plan's order."""
        specs = self._plan.specs
        if not specs:
            return []
        # Written before any work, so that a store that cannot be written is told at once.
        self._plan.write(self._store)
        self._find_finished()
        missing = [spec for spec in specs if spec.name not in self._entries]
        self._num_pairs_found = self._num_pairs_done = self._num_pairs - sum(len(spec.pairs) for spec in missing)
        if self._entries:
            _LOGGER.info("%d of %d shards were finished by an earlier run", len(self._entries), len(specs))
        base = self._plan.base.digest if self._plan.base else None
        tasks = [(spec, self._store.uri(), base) for spec in missing]
        for number, num_bytes in self._runner.run(_write_shard_task, tasks, self._tell):
            spec = missing[number]
            self._entries[spec.name] = self._entry_after(spec, num_bytes)
            self._num_pairs_done += len(spec.pairs)
            self._tell()
        entries = [self._entries[spec.name] for spec in specs]
        self._refuse_overwritten(entries)
        return entries

    def _find_finished(self) -> None:
        """Take what an earlier run wrote for these very specs; a shard that lacks pairs counts if that is allowed."""
        present = self._store.list_sizes(self._plan.folder)
        candidates = [spec for spec in self._plan.specs if spec.sidecar in present and spec.name in present]
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            entries = pool.map(self._try_entry, candidates)
            for spec, entry in zip(candidates, entries, strict=True):
                if entry is not None and self._is_what_we_want(entry, spec, present[spec.name].num_bytes):
                    self._entries[spec.name] = entry

    def _is_what_we_want(self, entry: ShardEntry, spec: ShardSpec, num_bytes: int | None) -> bool:
        return (
            entry.fingerprint == spec.fingerprint()
            and entry.info.num_bytes == num_bytes
            and (entry.is_checked or not spec.check_images)
            and (entry.info.num_pairs == len(spec.pairs) or self._skip_unusable)
        )

    def _entry_after(self, spec: ShardSpec, num_bytes: int | None) -> ShardEntry:
        """Return the entry of a shard that a task has written (so many bytes) or found published (None).

        Raises:
            ShardError: It is another job's and not what this one would have written.
        """
        entry = _compact(read_entry(self._store, spec.sidecar))
        if num_bytes is not None:
            self.num_written += 1
            self._num_bytes_written += num_bytes
        elif not self._is_what_we_want(entry, spec, self._store.size(spec.name)):
            raise ShardError(
                f"{self._store.uri(spec.name)}: another job published first and wrote this shard otherwise; it was not "
                "touched; the same command makes the next generation"
            )
        return entry

    def _refuse_overwritten(self, entries: list[ShardEntry]) -> None:
        """Refuse to go on if another job, not yet published either, replaced a shard by one of other pairs.

        Raises:
            ShardError: One has another size than its entry tells.
        """
        present = self._store.list_sizes(self._plan.folder)
        for entry in entries:
            status = present.get(entry.info.name)
            if status is None or status.num_bytes != entry.info.num_bytes:
                raise ShardError(
                    f"{self._store.uri(entry.info.name)}: was replaced while this job ran, another writes the same "
                    "plan otherwise; let that one end, then start the same command again"
                )

    def _try_entry(self, spec: ShardSpec) -> ShardEntry | None:
        try:
            return _compact(read_entry(self._store, spec.sidecar))
        except ShardError as error:
            _LOGGER.warning("%s is written again: %s", spec.name, error)
            return None

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(
                BuildProgress(
                    num_pairs=self._num_pairs,
                    num_pairs_done=self._num_pairs_done,
                    num_pairs_found=self._num_pairs_found,
                    num_shards=len(self._plan.specs),
                    num_shards_done=len(self._entries),
                    num_bytes_written=self._num_bytes_written,
                    num_retries=self._runner.num_retries,
                )
            )


def _write_shard_task(task: tuple[ShardSpec, str, str | None]) -> int | None:
    """Write a shard and return its bytes; None if another job has published meanwhile and the shard is there.

    Jobs of the same plan write under the same names, but not always the same shard: one checks images and leaves out
    what the other does not look at. What a manifest may name is never written over, so the pointer is asked before the
    work and, the work being done, once more just before the shard takes its name.
    """
    spec, store_uri, base = task
    store = Store.from_uri(store_uri)

    def leave_published() -> None:
        newest = read_pointer(store)
        if newest is not None and newest.digest != base and store.exists(spec.name):
            raise _PublishedError

    try:
        leave_published()
        return write_shard(spec, store, before_it_appears=leave_published).info.num_bytes
    except _PublishedError:
        return None


class _PublishedError(Exception):
    """A shard may be part of a manifest that another job published after this one planned."""


def _compact(entry: ShardEntry) -> ShardEntry:
    """Return the entry with columns of Arrow: of a million pairs, lists of Python objects would fill gigabytes."""
    columns = {name: pa.array(values, PAIR_SCHEMA.field(name).type) for name, values in entry.columns.items()}
    return replace(entry, columns=columns)
