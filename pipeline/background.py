"""Work done in order by threads that do not outlive the program."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
_Call = Callable[[], None]


class BackgroundThreads:
    """A few threads that carry out calls in the order they were submitted.

    Unlike those of `ThreadPoolExecutor` they are daemons: a program that ends, by an error perhaps, does not stay to
    finish what is still queued. They end when nobody holds this object any more.
    """

    def __init__(self, num_threads: int, *, name: str) -> None:
        """Name the threads; none is started before there is something to do."""
        self._num_threads = num_threads
        self._name = name
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._has_started = False

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Queue a call and return its future."""
        with self._starting:
            if not self._has_started:
                self._start()
        future: Future[T] = Future()

        def call() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:  # noqa: BLE001  raised again where the result is asked for
                    future.set_exception(error)

        self._calls.put(call)
        return future

    def _start(self) -> None:
        self._has_started = True
        for number in range(self._num_threads):
            threading.Thread(target=_work, args=[self._calls], name=f"{self._name}-{number}", daemon=True).start()
        weakref.finalize(self, _end, self._calls, self._num_threads)


def _work(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # waiting for the next one must not keep this one's result alive


def _end(calls: queue.SimpleQueue[_Call | None], num_threads: int) -> None:
    while not calls.empty():
        calls.get_nowait()
    for _ in range(num_threads):
        calls.put(None)
