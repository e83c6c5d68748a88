"""Ctrl-C that is heard where a library drops it: it may be raised in a destructor, or in a callback of another."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn


class CtrlC:
    """While it is entered, in the main thread, SIGINT raises KeyboardInterrupt as usual, and is remembered."""

    def __init__(self) -> None:
        self._is_heard = False
        self._before: Any = None

    def __enter__(self) -> CtrlC:
        is_main = threading.current_thread() is threading.main_thread()
        # Whoever has SIGINT ignored, as a job in the background has, keeps it so.
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raise KeyboardInterrupt if SIGINT has come."""
        if self._is_heard:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> NoReturn:
        self._is_heard = True
        raise KeyboardInterrupt
