"""The search as it stands: a table that is redrawn in a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence

from jobs.entry import LINE_INTERVAL_S, LOGGER
from jobs.search.journal import TrialRecord
from jobs.search.plan import Search
from pipeline.search import Value

_REDRAW_S = 1.0
_ROWS = 20  # of the table in a terminal


class Table:
    """Tells the user of a search under way."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._is_terminal = sys.stderr.isatty()
        self._shown = 0.0
        self._height = 0

    def show(self, *, running: int, is_last: bool = False) -> None:
        """Perhaps redraw the table or print a line."""
        now = time.monotonic()
        if not is_last and now - self._shown < (_REDRAW_S if self._is_terminal else LINE_INTERVAL_S):
            return
        self._shown = now
        if self._is_terminal:
            self._draw(running)
        else:
            LOGGER.info(self._summary(running))

    def tell_end(self, record: TrialRecord) -> None:
        """Print one line about a trial that has ended."""
        if self._is_terminal:
            self._wipe()
        best = record.best(self._search.spec.metric)
        what = {"finished": "finished", "stopped": "stopped early", "failed": f"failed: {record.reason}"}[record.status]
        number = "" if best is None else f", best {self._search.spec.metric} {100 * best:.2f} %"
        LOGGER.info("%s %s after epoch %d%s (%s)", record.name, what, record.epoch, number, _values(record))

    def _summary(self, running: int) -> str:
        records = list(self._search.journal.in_order())
        counts = Counter(record.status for record in records)
        most = self._search.proposer.num_trials
        told = ", ".join(f"{counts[status]} {status}" for status in ("finished", "stopped", "failed") if counts[status])
        trials = f"{len(records)}" if most is None else f"{len(records)}/{most}"
        line = f"search: {trials} trials begun, {running} running" + (f", {told}" if told else "")
        best = max(records, key=lambda record: record.best(self._search.spec.metric) or -1.0, default=None)
        value = None if best is None else best.best(self._search.spec.metric)
        return line if best is None or value is None else f"{line}, best {100 * value:.2f} % ({best.name})"

    def _draw(self, running: int) -> None:
        self._wipe()
        rows = table_rows(list(self._search.journal.in_order())[-_ROWS:], metric=self._search.spec.metric)
        lines = [self._summary(running), *rows]
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
        self._height = len(lines)

    def _wipe(self) -> None:
        if self._height:
            sys.stderr.write(f"\x1b[{self._height}A\x1b[J")
            self._height = 0


def table_rows(records: Sequence[TrialRecord], *, metric: str) -> list[str]:
    """Return the rows of the table, a header first; a column for each searched key by the end of its name."""
    keys = list(dict.fromkeys(key for record in records for key in record.values))
    header = ["trial", "status", "epoch", metric, "time", *(key.rpartition(".")[2] for key in keys)]
    cells = [header]
    for record in records:
        best = record.best(metric)
        told = [_text(record.values[key]) if key in record.values else "" for key in keys]
        percent = "" if best is None else f"{100 * best:.2f} %"
        cells.append([record.name, record.status, str(record.epoch), percent, f"{record.seconds:.0f} s", *told])
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _values(record: TrialRecord) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {_text(value)}" for key, value in record.values.items())


def _text(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
