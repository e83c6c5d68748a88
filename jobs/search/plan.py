"""A search under way: what its trials are made from, and which of them are left to do."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from typing import Any

from cvft.configuration import to_plain
from jobs.config import ExperimentConfig
from jobs.search.clock import Clock
from jobs.search.config import SearchConfig
from jobs.search.draw import Searcher
from jobs.search.journal import Generation, Journal, TrialRecord
from jobs.search.space import Space
from jobs.search.trial import trial_config
from jobs.training.progress import History
from jobs.training.saving import checkpoints_of
from pipeline.storage import Store
from pipeline.tracking.runs import Run

SEARCH_FILE = "tune.json"


@dataclass(frozen=True, kw_only=True)
class Search:
    """All that the trials of a search are made from.

    Attributes:
        spec: The specification.
        base: What every trial starts from.
        space: What is searched.
        proposer: Who proposes.
        out: The search's folder.
        run: The search's run in MLflow.
        journal: What happened so far.
        clock: The time used so far.
        about: What the search's own file says, `tune.json`.
    """

    spec: SearchConfig
    base: ExperimentConfig
    space: Space
    proposer: Searcher
    out: Store
    run: Run
    journal: Journal
    clock: Clock
    about: dict[str, Any]

    @property
    def is_population(self) -> bool:
        """Whether trials take over each other's weights."""
        return self.spec.scheduler.kind == "pbt"

    def unfinished(self) -> list[int]:
        """Return the numbers of the trials that have begun and not ended."""
        return [record.number for record in self.journal.in_order() if record.status == "running"]

    def num_left(self) -> int | None:
        """Return how many trials may still begin; none is any number."""
        most = self.proposer.num_trials
        return None if most is None else sum(number not in self.journal.records for number in range(most))

    def next_number(self) -> int:
        """Return the number of the next trial to begin."""
        return next(number for number in itertools.count() if number not in self.journal.records)

    @property
    def has_work(self) -> bool:
        """Whether there are trials to do and time to do them in."""
        return bool(self.unfinished() or self.num_left() != 0) and not self.clock.used_up

    def begin(self, number: int) -> dict[str, Any]:
        """Put a trial on record, unless it is, and return what its actor is told."""
        record = self.journal.records.get(number)
        if record is None:
            values = self.proposer.propose(number, self.journal.in_order())
            record = TrialRecord(number=number, generations=(Generation(values=values),))
            self.journal.put(record)
        record = self._without_empty_generation(record)
        return told(record.number, len(record.generations), record.generations[-1])

    def save(self) -> None:
        """Write the search's own file, with the time used so far.

        Raises:
            StoreError: The folder cannot be written.
        """
        content = {**self.about, "seconds": self.clock.seconds}
        data = json.dumps(content, indent=2).encode()
        self.journal.patiently(lambda: self.out.write_bytes(SEARCH_FILE, data))

    def config(self, record: TrialRecord) -> ExperimentConfig:
        """Return what a trial trains now."""
        return trial_config(
            to_plain(self.base),
            self.out.uri(),
            number=record.number,
            generation=len(record.generations),
            values=record.values,
        )

    def is_finished(self, record: TrialRecord) -> bool:
        """Tell whether a trial has trained all epochs, or stopped for itself."""
        history = History()
        for metrics in record.evaluations:
            history = history.then(dict(metrics))
        train = self.base.train
        return history.is_finished(num_epochs=train.num_epochs, patience=train.early_stopping)

    def _without_empty_generation(self, record: TrialRecord) -> TrialRecord:
        """Go back to the generation before one that was killed before it had the donor's weights."""
        while len(record.generations) > 1 and not checkpoints_of(self.config(record)).names():
            record = replace(record, generations=record.generations[:-1])
            self.journal.put(record)
        return record


def told(number: int, generation: int, about: Generation) -> dict[str, Any]:
    """Return what a trial's actor is told."""
    content: dict[str, Any] = {"number": number, "generation": generation, "values": dict(about.values)}
    if about.donor:
        content["origin"] = {"donor": about.donor, "epoch": about.epoch, "step": about.step}
    return content
