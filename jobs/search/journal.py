"""What happened to the trials of a search, one small file for each: the truth from which a search goes on.

    OUT/tune.json                     the search: specification, base, data, time used
    OUT/trials/trial-0007/trial.json  values, evaluations, how it ended
    OUT/trials/trial-0007/            the training itself, as `train` writes it

A trial's file is written before the trial begins, after each evaluation and when it ends, each time as a whole; the
driver alone writes it. What it lacks after a kill is in the training's own checkpoints and is told again from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from pipeline.patience import patiently
from pipeline.search import SearchTrial, Status, Value
from pipeline.storage import Store

T = TypeVar("T")
TRIALS = "trials"
_FILE = "trial.json"
_PATH = re.compile(rf"trial-(\d+)/{re.escape(_FILE)}")


def trial_name(number: int) -> str:
    """Name a trial: its folder and its run."""
    return f"trial-{number:04d}"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A part of a trial under one set of values; all but those of population-based training have one.

    Attributes:
        values: What is set, by dotted key.
        donor: Trial whose weights it started from; empty for the first.
        donor_generation: Number of the donor's generation.
        epoch: Epochs that those weights were trained.
        step: Steps likewise.
    """

    values: Mapping[str, Value]
    donor: str = ""
    donor_generation: int = 0
    epoch: int = 0
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial so far.

    Attributes:
        number: From 0 on.
        generations: In order; the last one is under way.
        status: As in `SearchTrial`.
        reason: Why it failed.
        evaluations: Numbers of each evaluation.
        seconds: Time that it computed.
        is_closed: Whether MLflow knows how it ended.
    """

    number: int
    generations: tuple[Generation, ...]
    status: Status = "running"
    reason: str = ""
    evaluations: tuple[Mapping[str, float], ...] = ()
    seconds: float = 0.0
    is_closed: bool = False

    @property
    def name(self) -> str:
        """Its name."""
        return trial_name(self.number)

    @property
    def values(self) -> Mapping[str, Value]:
        """Its values now."""
        return self.generations[-1].values

    @property
    def epoch(self) -> int:
        """Epochs evaluated."""
        return int(self.evaluations[-1]["epoch"]) if self.evaluations else 0

    def best(self, metric: str) -> float | None:
        """Return the highest value of a metric; None before the first evaluation."""
        return max((numbers[metric] for numbers in self.evaluations), default=None)

    def then(self, metrics: Mapping[str, float]) -> TrialRecord:
        """Return the record with one more evaluation; one of the same or a later epoch is replaced."""
        before = tuple(numbers for numbers in self.evaluations if numbers["epoch"] < metrics["epoch"])
        return replace(self, evaluations=(*before, dict(metrics)))

    def report(self, run_id: str) -> SearchTrial:
        """Return it as the search's report takes it."""
        return SearchTrial(
            name=self.name,
            values=dict(self.values),
            status=self.status,
            evaluations=self.evaluations,
            seconds=self.seconds,
            reason=self.reason,
            donor=self.generations[-1].donor,
            run_id=run_id,
        )


@dataclass(frozen=True, kw_only=True)
class Journal:
    """The trials' records, in memory and in the search's folder.

    Attributes:
        store: The search's folder.
        patience_s: Time that the store may be away.
        guard: Called before each write; what it raises prevents it.
        records: By number.
    """

    store: Store
    patience_s: float
    guard: Callable[[], None]
    records: dict[int, TrialRecord] = field(default_factory=dict)

    def load(self) -> None:
        """Read all records.

        Raises:
            StoreError: The folder cannot be read.
        """
        trials = Store.from_uri(self.store.uri(TRIALS))
        for path in trials.list():
            if found := _PATH.fullmatch(path):
                self.records[int(found[1])] = _decode(trials.read_bytes(path))

    def put(self, record: TrialRecord) -> None:
        """Write a record.

        Raises:
            TakenOverError: Another driver goes on with this search.
            StoreError: The folder cannot be written.
        """
        path = f"{TRIALS}/{record.name}/{_FILE}"
        data = json.dumps(asdict(record), indent=2).encode()

        def write() -> None:
            self.guard()
            self.store.write_bytes(path, data)

        self.patiently(write)
        self.records[record.number] = record

    def patiently(self, function: Callable[[], T]) -> T:
        """Call a function until the store answers, as `pipeline.patience` does."""
        return patiently(function, patience_s=self.patience_s)

    def folder(self, number: int) -> str:
        """Return the URI of a trial's folder."""
        return self.store.uri(f"{TRIALS}/{trial_name(number)}")

    def in_order(self) -> Iterator[TrialRecord]:
        """Yield the records in the order of their numbers."""
        for number in sorted(self.records):
            yield self.records[number]


def _decode(data: bytes) -> TrialRecord:
    plain: dict[str, Any] = json.loads(data)
    generations = tuple(Generation(**item) for item in plain.pop("generations"))
    return TrialRecord(generations=generations, evaluations=tuple(plain.pop("evaluations")), **plain)
