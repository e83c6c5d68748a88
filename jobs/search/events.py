"""What happens to the trials of a search as Tune tells it: put on record, told to the user, closed in MLflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ray.tune import Callback
from ray.util import remove_placement_group

from jobs import tracked
from jobs.entry import LOGGER
from jobs.search.journal import TrialRecord
from jobs.search.plan import Search
from jobs.search.table import Table
from jobs.search.trial import read_failure, read_run
from jobs.training.ray_train import room_of

_SAVE_S = 15.0
_CLOSE_AFTER_S = 5.0  # a trial's process is gone by then; what it left for MLflow is sent by the driver


class Unpickled:
    """Stays out of the state that Tune writes, of which nothing is read here."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Events(Unpickled, Callback):  # type: ignore[misc]  # Ray has no types
    """Keeps the journal while Tune works."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._table = Table(search)
        self._saved = time.monotonic()
        self._running: dict[str, int] = {}
        self._closing: dict[int, tuple[float, Future[None] | None]] = {}
        self._rooms: list[tuple[float, Any]] = []
        self._closer = ThreadPoolExecutor(1, thread_name_prefix="close-runs")

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count its time from now on."""
        self._running[trial.trial_id] = _number(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """Put an evaluation on record."""
        self._tick()
        record = self._search.journal.records[_number(trial)]
        self._search.journal.put(record.then(_numbers(result)))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Put on record how it ended; one that the budget cut goes on when the search does."""
        self._leave(trial)
        record = self._search.journal.records[_number(trial)]
        failure = self._search.journal.patiently(lambda: read_failure(self._search.journal.folder(record.number)))
        if failure is not None:
            self._end(replace(record, status="failed", reason=failure))
        elif self._search.is_finished(record):
            self._end(replace(record, status="finished"))
        elif not self._search.clock.used_up:
            self._end(replace(record, status="stopped"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Put on record that it failed each time it was tried."""
        self._leave(trial)
        record = self._search.journal.records[_number(trial)]
        self._end(replace(record, status="failed", reason=_reason(trial)))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say why it is tried again."""
        self._leave(trial)
        LOGGER.warning("%s is tried again: %s", trial, _reason(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Count the time and keep what is due; Tune calls it several times a second."""
        alive = {trial.trial_id for trial in trials if trial.status == "RUNNING"}
        self._running = {identity: number for identity, number in self._running.items() if identity in alive}
        self._tick()
        self._close_due()
        self._free_rooms(at=time.monotonic())
        self._table.show(running=len(self._running))

    def finish(self) -> None:
        """Wait for what is under way."""
        self._free_rooms(at=float("inf"))
        self._closer.shutdown(wait=True)
        self._note_closed()
        self._table.show(running=0, is_last=True)

    def _leave(self, trial: Any) -> None:
        self._tick()
        self._running.pop(trial.trial_id, None)
        if self._search.spec.trial.workers > 1:
            folder = self._search.journal.folder(_number(trial))
            room = self._search.journal.patiently(lambda: room_of(folder))
            if room is not None:
                self._rooms.append((time.monotonic() + _CLOSE_AFTER_S, room))

    def _free_rooms(self, *, at: float) -> None:
        """Free what workers of trials that ended a while ago may hold: without it the next ones may wait for ever."""
        for due, room in list(self._rooms):
            if at >= due:
                self._rooms.remove((due, room))
                remove_placement_group(room)

    def _tick(self) -> None:
        self._search.clock.tick(self._running.values())
        if time.monotonic() - self._saved > _SAVE_S:
            self._saved = time.monotonic()
            self._search.save()
            for number in self._running.values():
                self._search.journal.put(self._search.journal.records[number])

    def _end(self, record: TrialRecord) -> None:
        self._search.journal.put(record)
        self._table.tell_end(record)
        self._closing[record.number] = (time.monotonic() + _CLOSE_AFTER_S, None)

    def _close_due(self) -> None:
        now = time.monotonic()
        for number, (due, future) in self._closing.items():
            if future is None and now >= due:
                record = self._search.journal.records[number]
                self._closing[number] = (due, self._closer.submit(close_run, self._search, record))
        self._note_closed()

    def _note_closed(self) -> None:
        for number, (_, future) in list(self._closing.items()):
            if future is not None and future.done():
                del self._closing[number]
                future.result()
                self._search.journal.put(replace(self._search.journal.records[number], is_closed=True))


def close_runs(search: Search) -> None:
    """Tell MLflow of every trial that ended how it did, where it does not know, and what it has not taken yet."""
    for record in list(search.journal.in_order()):
        if record.status != "running" and not record.is_closed:
            close_run(search, record)
            search.journal.put(replace(record, is_closed=True))
        elif record.is_closed and (run := read_run(search.journal.folder(record.number))) is not None:
            for number in range(1, len(record.generations) + 1):
                tracked.deliver(search.config(replace(record, generations=record.generations[:number])), run)


def close_run(search: Search, record: TrialRecord) -> None:
    """Tell MLflow how a trial ended, after all that its process left to be told."""
    run = search.journal.patiently(lambda: read_run(search.journal.folder(record.number)))
    if run is None:
        return  # it failed before it had a run
    tags = {"search.trial": record.name, "search.status": record.status, "search.reason": record.reason}
    status: Literal["FAILED", "FINISHED"] = "FAILED" if record.status == "failed" else "FINISHED"
    ends = [generation.epoch for generation in record.generations[1:]] + [search.base.train.num_epochs]
    for number, (generation, end) in enumerate(zip(record.generations, ends, strict=True), start=1):
        config = search.config(replace(record, generations=record.generations[:number]))
        own = [metrics for metrics in record.evaluations if generation.epoch < metrics["epoch"] <= end]
        tracked.finish_run(config, run, status, evaluations=own, tags=tags)


def _number(trial: Any) -> int:
    return int(trial.config["trial"]["number"])


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an evaluation without what Tune adds."""
    own = ("epoch", "step", "loss", "pairs_per_s", "chance", "median_rank")
    return {name: value for name, value in result.items() if name in own or name.startswith(("recall_", "num_"))}


def _reason(trial: Any) -> str:
    """Return in one line why a trial's process ended: the error, without its traceback."""
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8")
    except (OSError, TypeError):  # Tune has kept none
        return "its process ended without a word"
    *_, newest = text.split("Failure # ")
    lines = [line.strip() for line in newest.splitlines()[1:] if line.strip()]
    if not lines:
        return "its process ended without a word"
    is_traceback = "Traceback" in newest or "ray::" in lines[0]  # Ray begins its own with where it was raised
    return (lines[-1] if is_traceback else lines[0])[:500]
