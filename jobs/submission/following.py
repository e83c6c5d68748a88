"""A job on a cluster seen from here: what it waits for, what it prints, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import deque
from typing import Any

import aiohttp

from cvft.errors import ClusterError
from jobs.entry import LOGGER
from jobs.submission.job_server import Attempt, AwayError, JobServer

_POLL_S = 1.0
_SAY_S = 10.0
_PATIENCE_S = 120.0
_KEPT_CHARACTERS = 200_000


class Follower:
    """Follows one job to its end.

    Attributes:
        output: The end of what it printed, as long as a result may be.
    """

    def __init__(self, server: JobServer, attempt: Attempt) -> None:
        self._server = server
        self._attempt = attempt
        self._num_shown = 0
        self._kept: deque[str] = deque()
        self._num_kept = 0
        self._last_said = time.monotonic()
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
        while True:
            try:
                attempt = self._server.get(self._attempt.id)
                if attempt.status == "PENDING":
                    self._say_what_for(attempt)
                else:
                    asyncio.run(self._show())
                    attempt = self._server.get(attempt.id)
                    if attempt.is_over:
                        return attempt
                self._away_since = None
            except (AwayError, aiohttp.ClientError, RuntimeError) as error:
                self._be_patient(error)
            time.sleep(_POLL_S)

    def _say_what_for(self, attempt: Attempt) -> None:
        needs = " ".join(f"{name} {number:g}" for name, number in attempt.needs.items())
        if self._server.never_holds(attempt):
            self._server.stop(attempt.id)
            raise ClusterError(
                f"{attempt.id}: no type of node of {self._server.address} holds {needs}, now or later; "
                "ask for less by --num-cpus and --num-gpus, or for other nodes by --label"
            )
        if time.monotonic() - self._last_said >= _SAY_S:
            self._last_said = time.monotonic()
            lacks = self._server.lacks()
            LOGGER.info(
                "%s waits for %s%s", attempt.id, needs or "Ray to start it", f"; asked for: {lacks}" if lacks else ""
            )

    def _be_patient(self, error: Exception) -> None:
        now = time.monotonic()
        self._away_since = now if self._away_since is None else self._away_since
        if now - self._away_since > _PATIENCE_S:
            raise ClusterError(f"{self._server.address} has not answered for {_PATIENCE_S:.0f} s: {error}") from error
        if now - self._last_said >= _SAY_S:
            self._last_said = now
            LOGGER.warning("%s does not answer; waiting for it, the job may go on meanwhile", self._server.address)

    async def _show(self) -> None:
        """Show what was not shown before: Ray tells all from the beginning each time."""
        num_seen = 0
        async for chunk in self._server.tail(self._attempt.id):
            new = chunk[max(0, self._num_shown - num_seen) :]
            num_seen += len(chunk)
            if new:
                sys.stderr.write(new)
                sys.stderr.flush()
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
