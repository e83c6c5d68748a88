"""A job on a cluster seen from here: what it waits for, what it prints, how it ends.

Its status is the head's and its log lies on the node that it runs on: either may be away while the other is there. A
head that is started again is waited for; a job that was lost meanwhile ends as lost, and one that lives goes on being
shown from where it was left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import aiohttp

from cvft.errors import ClusterError
from jobs.entry import LOGGER
from jobs.submission import waiting
from jobs.submission.attempt import Attempt
from jobs.submission.job_server import AwayError, BusyError, JobServer, UnknownJobError
from jobs.submission.screen import Screen

_POLL_S = 1.0
_SAY_S = 10.0
_SILENCE_S = 5.0
_PATIENCE_S = 600.0  # a new head in Kubernetes may pull its image first
_KEPT_CHARACTERS = 200_000


class LogError(ClusterError):
    """What a job prints cannot be read now; the job may be well."""


class Follower:
    """Follows one job to its end.

    Attributes:
        output: The end of what it printed, as long as a result may be.
    """

    def __init__(self, server: JobServer, attempt: Attempt) -> None:
        self._server = server
        self._attempt = attempt
        self._num_shown = 0
        self._screen = Screen()
        self._kept: deque[str] = deque()
        self._num_kept = 0
        self._last_said = time.monotonic()
        self._last_woken = -math.inf
        self._away_since: float | None = None

    @property
    def output(self) -> str:
        """The end of what the job printed."""
        return "".join(self._kept)

    def follow(self) -> Attempt:
        """Show what the job prints on standard error until it is over, and return how it ended.

        Raises:
            ClusterError: The cluster can never hold the job, which is stopped then; or it has been away for minutes.
        """
        try:
            return self._follow()
        finally:
            self._screen.close()
            if self._screen.num_left_out:
                told = "%d lines of stacks of Ray's own raylets are not shown; ray job logs %s has them"
                LOGGER.info(told, self._screen.num_left_out, self._attempt.id)

    def _follow(self) -> Attempt:
        while True:
            try:
                attempt = self._look()
                if attempt.is_over:
                    return attempt
            except LogError as error:
                self._do_without_log(error)
            except (AwayError, BusyError) as error:
                self._be_patient(error)
            except UnknownJobError:
                return replace(self._attempt, status="FAILED", message="the cluster knows it no more", is_lost=True)
            time.sleep(_POLL_S)

    def _look(self) -> Attempt:
        attempt = self._server.get(self._attempt.id)
        self._is_there()
        if attempt.is_over:
            self._show_all()
        elif attempt.status == "PENDING":
            return self._wait_for_room(attempt)
        else:
            asyncio.run(self._show())
            attempt = self._server.get(attempt.id)
            if not attempt.is_over:  # Ray ends the log as usual where the job's node does not answer
                raise LogError("its node does not answer")
        return attempt

    def _wait_for_room(self, attempt: Attempt) -> Attempt:
        if waiting.never_holds(self._server, attempt):
            self._server.withdraw(attempt.id)
            raise ClusterError(
                f"{attempt.id}: no node that {self._server.address} has or adds holds {waiting.asked_of(attempt)}; "
                "ask for less by --num-cpus and --num-gpus, or for other nodes by --label"
            )
        if self._is_time_to_speak():
            if waiting.never_begins(self._server, attempt):
                return replace(attempt, status="FAILED", is_lost=True, is_not_started=True)
            LOGGER.info("%s waits for %s", attempt.id, waiting.describe(self._server, attempt))
        return attempt

    def _is_there(self) -> None:
        if self._away_since is not None:
            self._away_since = None
            LOGGER.info("%s answers again", self._server.address)
            self._server.wake(self._attempt.id)

    def _be_patient(self, error: Exception) -> None:
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            LOGGER.warning("%s does not answer; waiting for it, the job may go on meanwhile", self._server.address)
        if now - self._away_since > _PATIENCE_S:
            raise ClusterError(f"{self._server.address} has not answered for {_PATIENCE_S:.0f} s: {error}") from error

    def _do_without_log(self, error: LogError) -> None:
        """Read what there is without following it: the head may have been started again, or a proxy be between."""
        if time.monotonic() - self._last_woken >= _SAY_S:
            self._last_woken = time.monotonic()
            self._server.wake(self._attempt.id)
        if not self._show_all() and self._is_time_to_speak():
            LOGGER.warning("%s runs, but its log cannot be read now: %s", self._attempt.id, error)

    def _is_time_to_speak(self) -> bool:
        is_time = time.monotonic() - self._last_said >= _SAY_S
        if is_time:
            self._last_said = time.monotonic()
        return is_time

    async def _show(self) -> None:
        """Show what was not shown before, until the job is over: Ray tells all from the beginning each time.

        Raises:
            LogError: The log cannot be read, or not any more.
            AwayError: The head does not answer.
        """
        num_seen = 0
        async with contextlib.aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                self._show_new(chunk, num_seen)
                num_seen += len(chunk)

    async def _chunks(self) -> AsyncGenerator[str]:
        """Yield the log as it comes; in silence, see whether the job is over: its host may be cut off."""
        log = self._server.tail(self._attempt.id)
        coming = asyncio.ensure_future(anext(log, None))
        try:
            was_over = False
            while True:
                done, _ = await asyncio.wait({coming}, timeout=_SILENCE_S)
                if done:
                    chunk = coming.result()
                    if chunk is None:
                        return
                    yield chunk
                    coming = asyncio.ensure_future(anext(log, None))
                elif was_over:  # it had time to tell the rest
                    return
                else:
                    was_over = (await asyncio.to_thread(self._server.get, self._attempt.id)).is_over
        except (aiohttp.ClientError, RuntimeError, OSError) as error:
            raise LogError(" ".join(str(error).split())[:200]) from error
        finally:
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, aiohttp.ClientError, RuntimeError):
                await coming
            await log.aclose()

    def _show_all(self) -> bool:
        """Show what was not shown before of what can be read; return whether there was any."""
        text = self._server.logs(self._attempt.id)
        is_more = len(text) > self._num_shown
        self._show_new(text, 0)
        return is_more

    def _show_new(self, text: str, num_before: int) -> None:
        new = text[max(0, self._num_shown - num_before) :]
        if new:
            self._screen.write(new)
            self._num_shown += len(new)
            self._keep(new)

    def _keep(self, text: str) -> None:
        self._kept.append(text)
        self._num_kept += len(text)
        while self._num_kept - len(self._kept[0]) > _KEPT_CHARACTERS:
            self._num_kept -= len(self._kept.popleft())


def find_result(text: str) -> dict[str, Any] | None:
    """Return the last line of a job's output that is a result: an object of JSON."""
    for line in reversed(text.splitlines()):
        if line.startswith("{") and line.endswith("}"):
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    return found
    return None
