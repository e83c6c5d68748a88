"""What an outbox kept goes to MLflow: every metric of a step once, every call in its order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mlflow.entities import Metric

from pipeline.tracking.external import record_checkpoints
from pipeline.tracking.runs import MAX_METRICS, Run, opened
from pipeline.tracking.server import STORE_ERRORS, is_refusal, reason_of
from pipeline.tracking.spool import Entry, Spool

_LOGGER = logging.getLogger(__name__)
# What may wait in a spool: called with the run, and with arguments that are plain JSON.
DEFERRED: dict[str, Callable[..., None]] = {
    call.__name__: call
    for call in (
        Run.set_tags,
        Run.log_config,
        Run.log_dataset,
        Run.log_text,
        Run.log_folder,
        Run.resume,
        Run.finish,
        record_checkpoints,
    )
}


class Delivery:
    """Sends a spool's entries to a run.

    The first value of a metric at a step stays: a step that is done again after a crash is not logged again, and what
    was sent without an answer is not sent twice. What MLflow refuses for good is set aside in `NAME.refused.jsonl`.

    Attributes:
        run: The run; it has an id once MLflow has taken anything.
        num_refused: Entries set aside.
        num_torn: Torn lines left out.
    """

    def __init__(self, run: Run, spool: Spool) -> None:
        self.run = run
        self._spool = spool
        self._steps: dict[str, set[int]] = {}  # by metric, what MLflow has
        self._sent = -1
        self._refused = spool.path.with_suffix(".refused.jsonl")
        self.num_refused = 0
        self.num_torn = 0

    def send(self) -> int:
        """Send everything that is pending and return the number of entries; the caller holds `Spool.sending`.

        Raises:
            MlflowException, SQLAlchemyError, OSError, StoreError: MLflow, or a store whose files it takes, does not
                answer; what it has taken is remembered.
        """
        if self._sent != self._spool.sent:  # the first time, or another process has sent meanwhile
            self._steps.clear()
        num_sent = 0
        try:
            for group in _groups(self._spool.pending()):
                self.run = opened(self.run)
                self._send_group(group)
                self._spool.mark_sent(group[-1].end)
                num_sent += len(group)
        except STORE_ERRORS:
            self._steps.clear()  # a request without an answer may have arrived
            raise
        finally:
            self._sent = self._spool.sent
        return num_sent

    def _send_group(self, group: list[Entry]) -> None:
        contents = [entry.content for entry in group if entry.content is not None]
        if len(contents) < len(group):
            self.num_torn += len(group) - len(contents)
            _LOGGER.warning("%s: left out a torn line: its process was ended while it wrote", self._spool.path)
        try:
            self._send_contents(contents)
        except STORE_ERRORS as error:
            if not is_refusal(error):
                raise
            for content in contents:  # one of them spoils the others' request
                self._send_alone(content)

    def _send_alone(self, content: dict[str, Any]) -> None:
        try:
            self._send_contents([content])
        except STORE_ERRORS as error:
            if not is_refusal(error):
                raise
            self._set_aside(content, error)

    def _send_contents(self, contents: list[dict[str, Any]]) -> None:
        if contents and "call" in contents[0]:
            DEFERRED[contents[0]["call"]](self.run, **contents[0]["arguments"])
            return
        metrics = self._missing(metric for content in contents for metric in _metrics(content))
        self.run.log_batches(metrics)
        for metric in metrics:
            self._steps[metric.key].add(metric.step)

    def _missing(self, metrics: Iterable[Metric]) -> list[Metric]:
        """Return the metrics that MLflow does not have, the first of each step."""
        first: dict[tuple[str, int], Metric] = {}
        for metric in metrics:
            first.setdefault((metric.key, metric.step), metric)
        unknown = {name for name, _ in first} - self._steps.keys()
        # One request tells for all metrics of a new run that there is no history to read.
        logged = self.run.client.get_run(self.run.run_id).data.metrics if unknown else {}
        for name in unknown:
            history = self.run.client.get_metric_history(self.run.run_id, name) if name in logged else []
            self._steps[name] = {metric.step for metric in history}
        return [metric for metric in first.values() if metric.step not in self._steps[metric.key]]

    def _set_aside(self, content: dict[str, Any], error: Exception) -> None:
        aside = Spool(self._refused)
        aside.append(content)
        aside.close()
        if self.num_refused == 0:
            _LOGGER.warning(
                "MLflow refuses an entry of run %s: %s; kept in %s", self.run.run_id, reason_of(error), self._refused
            )
        self.num_refused += 1


def _metrics(content: dict[str, Any]) -> list[Metric]:
    return [
        Metric(name, float(value), content["timestamp_ms"], content["step"])
        for name, value in content["metrics"].items()
    ]


def _groups(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Join neighbouring entries of metrics up to one request's limit; a call stays alone."""
    group: list[Entry] = []
    num_metrics = 0
    for entry in entries:
        content = entry.content or {}
        size = len(content.get("metrics", ()))
        if group and ("call" in content or num_metrics + size > MAX_METRICS):
            yield group
            group, num_metrics = [], 0
        group.append(entry)
        num_metrics += size
        if "call" in content:
            yield group
            group, num_metrics = [], 0
    if group:
        yield group
