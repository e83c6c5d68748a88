"""Lines on this machine's disk that are still to be sent, and how far they were.

A line is in the file when `append` returns, so that a killed process loses at most the one it was writing. Several
processes may append; one at a time sends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LOGGER = logging.getLogger(__name__)
_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a spool.

    Attributes:
        content: What was appended; none where a killed process left a torn line.
        end: Position in the file at which it ends.
    """

    content: dict[str, Any] | None
    end: int


class Spool:
    """An append-only file of JSON lines, `NAME.jsonl`, with the position up to which they were sent, `NAME.sent`.

    Attributes:
        path: The file of lines.
        num_lost: Entries of this process that the disk did not take.
    """

    def __init__(self, path: Path) -> None:
        """Open the spool, and make it where there is none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.num_lost = 0
        self._sent_path = path.with_suffix(".sent")
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._appending = threading.Lock()
        # What a killed process left half written gets an end of its own with the next line.
        size = self._size()
        self._is_torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        self._sent = 0
        if self._read_sent() > size:  # a machine without power lost lines: those that come now were not sent
            self.mark_sent(0)

    def append(self, content: dict[str, Any]) -> None:
        """Add a line; on a disk that takes no more, count the entry as lost and say so once."""
        line = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        with self._appending:
            data = b"\n" + line if self._is_torn else line
            try:
                num_written = os.write(self._descriptor, data)
                reason = "the disk took a part of it"
            except OSError as error:
                num_written, reason = 0, str(error.strerror)
            if num_written == len(data):
                self._is_torn = False
                return
            self._is_torn = self._is_torn or num_written > 0
            if self.num_lost == 0:
                _LOGGER.warning("%s: cannot keep a line for MLflow: %s; it is lost, free some space", self.path, reason)
            self.num_lost += 1

    def pending(self) -> Iterator[Entry]:
        """Yield what was not sent yet, oldest first."""
        position, rest = self.sent, b""
        while data := os.pread(self._descriptor, _READ_BYTES, position + len(rest)):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                position += len(line) + 1
                if line:
                    yield Entry(content=_parse(line), end=position)

    @property
    def num_pending(self) -> int:
        """Number of whole lines that were not sent yet."""
        return sum(entry.content is not None for entry in self.pending())

    @property
    def sent(self) -> int:
        """Position up to which everything was sent.

        It may be too small, never too large: a receiver must know what it has already.
        """
        return max(self._sent, self._read_sent())

    def mark_sent(self, position: int) -> None:
        """Remember that everything up to `position` was sent."""
        self._sent = position
        temporary = self._sent_path.with_name(f".{self._sent_path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # a full disk: this process knows, the next one sends some again
            temporary.write_text(str(position), encoding="ascii")
            temporary.replace(self._sent_path)

    def sync(self) -> None:
        """Wait until the lines have reached the disk itself, so that they outlive the machine's power."""
        with contextlib.suppress(OSError):  # the next time, perhaps; a killed process alone loses nothing
            os.fsync(self._descriptor)

    @contextlib.contextmanager
    def sending(self) -> Iterator[bool]:
        """Hold the right to send, among all processes that share the file; gives False where another one has it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the file back; nothing can be appended any more."""
        os.close(self._descriptor)
        self._descriptor = -1  # the number may soon be another file's

    def _read_sent(self) -> int:
        try:
            return int(self._sent_path.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):  # a machine without power may leave it empty
            return 0

    def _size(self) -> int:
        return os.fstat(self._descriptor).st_size


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return content if isinstance(content, dict) else None
