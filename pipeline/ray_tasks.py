"""A function over many inputs on Ray: a bounded window of tasks at a time, retried.

What a task raises because a store or a disk failed, and a worker or a node that is gone (killed, out of memory), is
tried again on another worker, up to three times for each input. Anything else stops all.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import ray

from cvft.configuration import require
from cvft.errors import ClusterError, CvftError, StoreError
from pipeline.runner import Input, Output

RaySession = Callable[[], AbstractContextManager[None]]

MAX_RETRIES = 3
_TICK_S = 1.0
_LOGGER = logging.getLogger(__name__)
_LOST = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
_ENDED = (ray.exceptions.LocalRayletDiedError, ray.exceptions.RaySystemError)


class OnRay:
    """Runs on Ray, which is entered only when there is something to run."""

    def __init__(
        self,
        *,
        window: int | None = None,
        session: RaySession = contextlib.nullcontext,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare to run.

        Args:
            window: Tasks submitted at a time; twice the cluster's CPUs if none, and more as an autoscaler adds some.
            session: Makes a Ray be there; without it Ray must be initialised.
            num_cpus: CPUs of a task.
            num_gpus: GPUs of a task.
            labels: Labels of the nodes that tasks run on; none takes any.

        Raises:
            ConfigError: `window` is less than 1.
        """
        require(window is None or window >= 1, f"window: {window} must be at least 1")
        self.num_retries = 0
        self._window = window
        self._session = session
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._labels = dict(labels or {})

    def run(
        self, function: Callable[[Input], Output], inputs: Sequence[Input], tick: Callable[[], None]
    ) -> Iterator[tuple[int, Output]]:
        """See `Runner`.

        Raises:
            ClusterError: Workers were lost again and again on one input, or Ray itself ended.
        """
        if inputs:
            try:
                with self._session():
                    yield from self._run(function, inputs, tick)
            except _ENDED as error:
                reason = " ".join(str(error).split())
                raise ClusterError(f"Ray ended ({reason[:300]}); what is finished is kept, start it again") from error

    def _run(
        self, function: Callable[[Input], Output], inputs: Sequence[Input], tick: Callable[[], None]
    ) -> Iterator[tuple[int, Output]]:
        tick()
        # Ray's own retries are off: it would try again in silence.
        task = ray.remote(max_retries=0, label_selector=self._labels, **self._resources)(_run_later)
        waiting = list(reversed(range(len(inputs))))
        running: dict[Any, int] = {}
        failures: Counter[int] = Counter()
        try:
            while waiting or running:
                # Tasks without a CPU are what an autoscaler adds nodes for: the window grows with them.
                size = self._window or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
                while waiting and len(running) < size:
                    number = waiting.pop()
                    running[task.remote(function, inputs[number], 0.5 * failures[number])] = number
                done, _ = ray.wait(list(running), num_returns=1, timeout=_TICK_S)
                for reference in done:
                    number = running.pop(reference)
                    try:
                        output = ray.get(reference)
                    except (ray.exceptions.RayTaskError, *_LOST) as error:
                        failures[number] += 1
                        self._retry_or_raise(error, failures[number])
                        waiting.append(number)
                    else:
                        yield number, output
                tick()
        finally:
            for reference in running:
                ray.cancel(reference)

    def _retry_or_raise(self, error: Exception, num_failures: int) -> None:
        cause = getattr(error, "cause", None)
        is_lost = isinstance(error, _LOST)
        reason = " ".join(str(error if cause is None else cause).split())
        if num_failures <= MAX_RETRIES and (is_lost or isinstance(cause, (OSError, StoreError))):
            self.num_retries += 1
            _LOGGER.warning("a task is tried again (%d of %d): %s", num_failures, MAX_RETRIES, reason[:300])
            return
        if is_lost:
            raise ClusterError(f"a worker was lost {num_failures} times on the same task: {reason[:300]}") from None
        # Ray's own error repeats the worker's traceback; ours is the one line that helps.
        raise cause if isinstance(cause, CvftError) else error


def _run_later(function: Callable[[Input], Output], content: Input, delay_s: float) -> Output:
    time.sleep(delay_s)
    return function(content)
