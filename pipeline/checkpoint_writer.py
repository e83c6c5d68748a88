"""Checkpoints written while the training goes on: one at a time, in order, with patience for a store that is away."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from cvft.snapshot import Snapshot
from pipeline.background import BackgroundThreads
from pipeline.checkpoints import CheckpointFolder
from pipeline.patience import patiently

OnWritten = Callable[[Mapping[str, Any], list[str]], None]
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Order:
    name: str
    snapshot: Snapshot
    best: str


class CheckpointWriter:
    """Writes into a folder of checkpoints from a thread of its own; used by one thread of one process.

    One checkpoint is on its way; others wait in memory, of which a newer one lets only the best so far stay. So a store
    that is away for a while holds up nobody and costs no more than three copies. After each that is written, all but
    the last ones and the best are deleted.

    An error of the thread is raised by the next call of any method.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        *,
        present: Iterable[str],
        keep_last: int,
        patience_s: float,
        guard: Callable[[], None] | None = None,
        on_written: OnWritten | None = None,
    ) -> None:
        """Prepare to write.

        Args:
            folder: Where.
            present: The checkpoints there that a training may go on from, oldest first; others go with the first
                deletion.
            keep_last: Number of checkpoints that stay besides the best one.
            patience_s: How long a store may be away, see `patiently`.
            guard: Called before a checkpoint is published and before others are deleted; what it raises stops both.
            on_written: Called by the thread once a checkpoint is durable and others are deleted, with the content
                of its `checkpoint.json` and the names of those that are there now.
        """
        self._folder = folder
        self._written = list(present)
        self._keep_last = keep_last
        self._patience_s = patience_s
        self._guard = guard or _no_guard
        self._on_written = on_written
        self._threads = BackgroundThreads(1, name="checkpoint")
        self._lock = threading.Lock()
        self._waiting: list[_Order] = []
        self._calls: deque[Future[None]] = deque()

    def submit(self, name: str, snapshot: Snapshot, *, best: str) -> None:
        """Have a checkpoint written; this does not wait.

        Args:
            name: Its name.
            snapshot: What to write.
            best: Name of the best checkpoint so far, which stays; "" if none is.

        Raises:
            CvftError: An earlier one could not be written.
        """
        self.check()
        with self._lock:
            left_out = [waiting.name for waiting in self._waiting if waiting.name != best or waiting.name == name]
            self._waiting = [waiting for waiting in self._waiting if waiting.name not in left_out]
            self._waiting.append(_Order(name, snapshot, best))
        self._calls.append(self._threads.submit(self._write_next))
        if left_out:
            _LOGGER.warning("%s not written: %s came before the store was free", ", ".join(left_out), name)

    def check(self) -> None:
        """Raise what went wrong since the last call.

        Raises:
            CvftError: A checkpoint could not be written.
        """
        while self._calls and self._calls[0].done():
            self._calls.popleft().result()

    def finish(self) -> None:
        """Wait until all that was submitted is durable.

        Raises:
            CvftError: A checkpoint could not be written.
        """
        while self._calls:
            self._calls.popleft().result()

    def settle(self, *, timeout_s: float) -> None:
        """Give what is on its way some time, where the training has failed anyway; its errors are only logged."""
        done, unfinished = wait(self._calls, timeout=timeout_s)
        self._calls.clear()
        for call in done:
            if error := call.exception():
                _LOGGER.warning("a checkpoint could not be written: %s", error)
        if unfinished:
            _LOGGER.warning("%d checkpoints could not be written within %.0f s", len(unfinished), timeout_s)

    def _write_next(self) -> None:
        with self._lock:
            if not self._waiting:  # a newer one took its place, whose own call found the first of those that waited
                return
            order = self._waiting.pop(0)
        begun = time.monotonic()
        patiently(lambda: self._write(order), patience_s=self._patience_s)
        self._written = [name for name in self._written if name != order.name] + [order.name]
        _LOGGER.info("%s written in %.1f s", order.name, time.monotonic() - begun)
        patiently(lambda: self._delete_others(order.best), patience_s=self._patience_s)
        if self._on_written is not None:
            self._on_written(order.snapshot.document, list(self._written))

    def _write(self, order: _Order) -> None:
        self._folder.write(order.name, order.snapshot, guard=self._guard)

    def _delete_others(self, best: str) -> None:
        self._guard()
        self._written = [name for name in self._written if name == best or name in self._written[-self._keep_last :]]
        self._folder.keep(self._written)


def _no_guard() -> None:
    pass
