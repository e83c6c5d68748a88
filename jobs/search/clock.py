"""The time that a search and its trials have used, over all of its starts, and whether the budget is used up."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from jobs.search.config import BudgetConfig
from jobs.search.journal import Journal

_HOUR_S = 3600.0


class Clock:
    """Counts while it is told which trials run.

    Attributes:
        seconds: Time for which the search has run.
    """

    def __init__(self, budget: BudgetConfig, journal: Journal, *, gpus_per_trial: float, seconds: float) -> None:
        """Go on from the time that earlier starts have used."""
        self._budget = budget
        self._journal = journal
        self._gpus = gpus_per_trial
        self._last = time.monotonic()
        self.seconds = seconds

    def tick(self, running: Iterable[int]) -> None:
        """Count the time since the last call for the search and for these trials."""
        now = time.monotonic()
        passed_s, self._last = now - self._last, now
        self.seconds += passed_s
        for number in running:
            record = self._journal.records[number]
            self._journal.records[number] = replace(record, seconds=record.seconds + passed_s)

    @property
    def gpu_hours(self) -> float:
        """The trials' time times their GPUs."""
        return self._gpus * sum(record.seconds for record in self._journal.records.values()) / _HOUR_S

    @property
    def used_up(self) -> str:
        """Which budget of time is used up, in words; empty while there is some left."""
        hours, gpu_hours = self._budget.hours, self._budget.gpu_hours
        if hours is not None and self.seconds >= hours * _HOUR_S:
            return f"budget.hours={hours:g}"
        if gpu_hours is not None and self.gpu_hours >= gpu_hours:
            return f"budget.gpu_hours={gpu_hours:g}"
        return ""
