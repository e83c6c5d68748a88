"""A function over many inputs, without Ray: in this process, or in several of this machine.

`pipeline.ray_tasks` is the same on a cluster. What runs on either is a module's own function, and its inputs and
outputs are small.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

from cvft.configuration import require
from cvft.errors import ClusterError

Input = TypeVar("Input")
Output = TypeVar("Output")

_TICK_S = 1.0


class Runner(Protocol):
    """Runs a function over inputs.

    Attributes:
        num_retries: How many times an input was tried again so far.
    """

    num_retries: int

    def run(
        self, function: Callable[[Input], Output], inputs: Sequence[Input], tick: Callable[[], None]
    ) -> Iterator[tuple[int, Output]]:
        """Yield (number of the input, output) as they are finished; call `tick` at the beginning and now and then."""
        ...


class Here:
    """Runs in this process, one input after the other."""

    num_retries = 0

    def run(
        self, function: Callable[[Input], Output], inputs: Sequence[Input], tick: Callable[[], None]
    ) -> Iterator[tuple[int, Output]]:
        """See `Runner`."""
        for number, content in enumerate(inputs):
            tick()
            yield number, function(content)


class Processes:
    """Runs in several processes of this machine, without retries."""

    num_retries = 0

    def __init__(self, num_processes: int) -> None:
        """Prepare to run in at most so many processes at a time.

        Raises:
            ConfigError: There is none.
        """
        require(num_processes >= 1, f"num_processes: {num_processes} must be at least 1")
        self._num_processes = num_processes

    def run(
        self, function: Callable[[Input], Output], inputs: Sequence[Input], tick: Callable[[], None]
    ) -> Iterator[tuple[int, Output]]:
        """See `Runner`.

        Raises:
            ClusterError: A process was killed.
        """
        # Not forked: a child of a process with threads may wait for a lock that nobody holds.
        context = multiprocessing.get_context("spawn")
        size = max(1, min(self._num_processes, len(inputs)))
        with ProcessPoolExecutor(size, mp_context=context) as pool:
            waiting: dict[Future[Output], int] = {
                pool.submit(function, content): number for number, content in enumerate(inputs)
            }
            try:
                while waiting:
                    tick()
                    done, _ = wait(waiting, timeout=_TICK_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield waiting.pop(future), future.result()
            except BrokenProcessPool as error:
                raise ClusterError(
                    "a process was killed (out of memory?); what is finished is kept, start it again with fewer"
                ) from error
            finally:
                for future in waiting:
                    future.cancel()
