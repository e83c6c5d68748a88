"""What a training tells MLflow is kept on this machine's disk first and sent by a thread.

MLflow may be slow, restarted or away for hours, and the training does not notice:

    with Outbox(run, "runs/town") as outbox:
        outbox.log_metrics({"train/loss": 0.5}, step=10)
        outbox.defer(Run.set_tags, tags={"host": "a"})

What is left when it closes stays in the spool and is sent by the next outbox of the same run. In a run's folder of an
object store the spool lies in this machine's cache; what MLflow has not taken is copied into the folder too, so that
another machine can send it.
"""

from __future__ import annotations

import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cvft.errors import StoreError
from pipeline.storage import Store
from pipeline.tracking.delivery import DEFERRED, Delivery
from pipeline.tracking.runs import Run
from pipeline.tracking.server import STORE_ERRORS, reason_of
from pipeline.tracking.spool import Spool

_LOGGER = logging.getLogger(__name__)
FOLDER = "outbox"
INTERVAL_S = 5.0
RETRY_S = (1.0, 60.0)
CLOSE_S = 20.0


class Outbox:
    """Takes a run's metrics and calls without waiting for MLflow; closed by leaving its `with` block.

    Attributes:
        path: The spool's file.
    """

    def __init__(
        self,
        run: Run,
        folder: str,
        *,
        cache: Path,
        interval_s: float = INTERVAL_S,
        retry_s: tuple[float, float] = RETRY_S,
    ) -> None:
        """Open the run's spool and begin to send what an earlier process left.

        Args:
            run: Where it goes; one without an id is started when MLflow answers.
            folder: URI of the training's folder; the spool is in `outbox/` there.
            cache: Folder of this machine that takes its place if it is in an object store.
            interval_s: Entries are sent together, this often.
            retry_s: Shortest and longest pause before MLflow is tried again.

        Raises:
            StoreError: The folder cannot be read or written.
        """
        store = Store.from_uri(folder)
        local = store.local_path(FOLDER)
        self.path = (local or cache / FOLDER) / f"{run.key}.jsonl"
        try:
            self._spool = Spool(self.path)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot keep metrics for MLflow here: {error.strerror}") from error
        self._copies = None if local else _Copies(store, run)
        if self._copies is not None:
            self._copies.collect(self._spool)
        self._delivery = Delivery(run, self._spool)
        self._interval_s, self._retry_s = interval_s, retry_s
        self._random = random.Random()  # the global one belongs to the training
        self._away_since: float | None = None
        self._num_left = 0
        self._is_closing = threading.Event()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    @property
    def run(self) -> Run:
        """The run; one that MLflow did not know has an id once MLflow has taken anything."""
        return self._delivery.run

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log numbers by name at a step, as of now; where a metric has a value at that step, the first one stays."""
        self._spool.append({"step": step, "timestamp_ms": _now_ms(), "metrics": dict(metrics)})

    def defer(self, call: Callable[..., None], **arguments: Any) -> None:
        """Make a call with the run later, such as `Run.set_tags`; in the order of all that is kept here.

        Args:
            call: One of those in `DEFERRED`.
            arguments: Plain JSON data.
        """
        if call.__name__ not in DEFERRED:
            raise ValueError(f"{call.__name__} cannot wait in a spool; it is none of {sorted(DEFERRED)}")
        self._spool.append({"call": call.__name__, "arguments": arguments})

    def close(self, wait_s: float = CLOSE_S) -> int:
        """Send what is left, unless MLflow does not answer or does not take it in time.

        Returns:
            Number of entries that stay in the spool.
        """
        if self._is_over.is_set():
            return self._num_left
        self._is_closing.set()
        self._thread.join(wait_s)
        self._is_over.set()
        self._num_left = self._spool.num_pending
        if self._num_left:
            if self._copies is not None:
                self._copies.save(self._spool)
            _LOGGER.warning(
                "%d entries for MLflow at %s wait in %s; the same command sends them when it is back",
                self._num_left,
                self.run.uri,
                self.path,
            )
        if self._spool.num_lost or self._delivery.num_refused:
            lost, refused = self._spool.num_lost, self._delivery.num_refused
            _LOGGER.warning("not in MLflow: %d entries that the disk did not take, %d refused by it", lost, refused)
        if not self._thread.is_alive():
            self._spool.close()
        return self._num_left

    def __enter__(self) -> Outbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        num_failures = 0
        while not self._is_over.is_set():
            # What is appended before closing is seen by an attempt that begins afterwards.
            is_last = self._is_closing.is_set()
            try:
                is_done = self._send()
                num_failures = 0
                pause_s = 0.1 if is_last else self._interval_s  # the process that is sending instead ends soon
            except STORE_ERRORS as error:
                self._note_away(error)
                is_done = True
                first_s, longest_s = self._retry_s
                pause_s = min(first_s * 2.0**num_failures, longest_s) * self._random.uniform(0.5, 1.0)
                num_failures = min(num_failures + 1, 30)
            if is_last and is_done:
                return
            (self._is_over if is_last else self._is_closing).wait(pause_s)

    def _send(self) -> bool:
        """Send everything; False if another process that shares the spool has the right to."""
        with self._spool.sending() as may_send:
            if not may_send:
                return False
            num_sent = self._delivery.send()
        if self._away_since is not None and num_sent:
            away_s = time.monotonic() - self._away_since
            self._away_since = None
            _LOGGER.warning("MLflow at %s is back after %.0f s; %d entries sent", self.run.uri, away_s, num_sent)
            if self._copies is not None:
                self._copies.drop()
        return True

    def _note_away(self, error: Exception) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            _LOGGER.warning(
                "MLflow at %s is away (%s); metrics are kept in %s and sent later",
                self.run.uri,
                reason_of(error),
                self.path,
            )
        self._spool.sync()
        if self._copies is not None:
            self._copies.save(self._spool)


class _Copies:
    """Copies, in the training's folder in an object store, of what MLflow has not taken."""

    def __init__(self, store: Store, run: Run) -> None:
        self._store = store
        self._folder = f"{FOLDER}/{run.key}"
        self._own = f"{self._folder}/{socket.gethostname()}.jsonl"
        self._saved_end = 0

    def collect(self, spool: Spool) -> None:
        """Move what other machines left into this one's spool; entries that are in both are sent once."""
        for path in self._store.list(self._folder):
            for line in self._store.read_bytes(path).splitlines():
                spool.append(json.loads(line))
            spool.sync()
            self._store.delete(path)

    def save(self, spool: Spool) -> None:
        """Write what is pending, if it grew; an object store that is away as well is tried again next time."""
        entries = [entry for entry in spool.pending() if entry.content is not None]
        if not entries or entries[-1].end == self._saved_end:
            return
        try:
            lines = [json.dumps(entry.content).encode() + b"\n" for entry in entries]
            self._store.write_bytes(self._own, b"".join(lines))
        except StoreError as error:
            _LOGGER.warning("cannot copy what waits for MLflow: %s", error)
            return
        self._saved_end = entries[-1].end

    def drop(self) -> None:
        """Delete this machine's copy: everything was sent."""
        if self._saved_end:
            self._saved_end = 0
            try:
                self._store.delete(self._own)
            except StoreError as error:
                _LOGGER.warning("cannot delete the copy of what was sent: %s", error)


def _now_ms() -> int:
    return int(time.time() * 1000)
