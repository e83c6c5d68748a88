"""What a training on Ray would leave behind on a cluster, so that nodes stay for nobody: taken back here.

Ray Train asks the autoscaler for a training's nodes by `request_resources`. A request that nobody takes back holds its
nodes for 200 s.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray

_PATIENCE_S = 10.0


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, which `ray job stop` sends, be Ctrl-C, in the main thread; a trial has others, which Tune ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def abort(controller: Any) -> None:
    """End the workers of a training and take its request back, by Ray Train's controller of it."""
    with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):  # it ends itself in the end
        ray.get(controller.abort.remote(), timeout=_PATIENCE_S)
