"""Parallel coordinates as a drawing within the page, whose lines a reader can point at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.search_lines import UNSET, Line, Lines
from pipeline.report.search_parallel import wrapped_name
from pipeline.report.search_words import metric_label

_LEFT_PX, _RIGHT_PX, _TOP_PX = 66.0, 96.0, 62.0
_TALL_PX = 330.0
_PAGE_PX, _MIN_WIDTH_PX, _MAX_STEP_PX, _MIN_STEP_PX = 1060.0, 700.0, 230.0, 104.0
_CHARACTER_PX = 6.3  # of a mark


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Words beside an axis."""

    y: float
    text: str


@dataclass(frozen=True, kw_only=True)
class DrawnAxis:
    """An axis: where it stands, its name in lines, its marks, and where the default is."""

    x: float
    name: str
    lines: Sequence[str]
    marks: Sequence[Mark]
    default: float | None


@dataclass(frozen=True, kw_only=True)
class DrawnLine:
    """A trial: its name, the path and its look."""

    trial: str
    path: str
    look: str


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A drawing in pixels."""

    width: float
    height: float
    top: float
    bottom: float
    axes: Sequence[DrawnAxis]
    lines: Sequence[DrawnLine]

    @property
    def is_wide(self) -> bool:
        """Whether it is wider than the page, and the last axis is seen by scrolling."""
        return self.width > _PAGE_PX


def drawing_of(lines: Lines) -> Drawing:
    """Lay the lines out."""
    gaps = max(len(lines.axes) - 1, 1)
    step = min(max((_PAGE_PX - _LEFT_PX - _RIGHT_PX) / gaps, _MIN_STEP_PX), _MAX_STEP_PX)
    x = [_LEFT_PX + step * column for column in range(len(lines.axes))]
    names = [wrapped_name(axis.name) for axis in lines.axes[:-1]] + [metric_label(lines.axes[-1].name)]
    top = _TOP_PX + 15.0 * max(name.count("\n") for name in names)
    bottom = top + _TALL_PX

    def y(place: float) -> float:
        return bottom - _TALL_PX * place

    axes = []
    for column, axis in enumerate(lines.axes):
        marks = [Mark(y=y(tick.place), text=_short(tick.text, step - 24)) for tick in axis.ticks]
        if lines.has_unset[column]:
            marks.append(Mark(y=y(UNSET), text="not set"))
        default = lines.default[column] if column < len(lines.default) else None
        axes.append(
            DrawnAxis(
                x=x[column],
                name=axis.name,
                lines=names[column].split("\n"),
                marks=marks,
                default=None if default is None else y(default),
            )
        )
    return Drawing(
        width=max(x[-1] + _RIGHT_PX, _MIN_WIDTH_PX),
        height=y(UNSET) + 22 if any(lines.has_unset) else bottom + 22,
        top=top,
        bottom=bottom,
        axes=axes,
        lines=[
            DrawnLine(
                trial=line.trial.name,
                path=_path([(at, y(place)) for at, place in zip(x, line.places, strict=True)]),
                look=_look(line),
            )
            for line in lines.lines
        ],
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    parts = ["M{:.1f} {:.1f}".format(*points[0])]
    for (left, before), (right, after) in itertools.pairwise(points):
        middle = (left + right) / 2
        parts.append(f"C{middle:.1f} {before:.1f} {middle:.1f} {after:.1f} {right:.1f} {after:.1f}")
    return "".join(parts)


def _look(line: Line) -> str:
    ending = "" if line.trial.status == "finished" else " ended"
    return f"shade{line.shade}{' best' if line.is_best else ''}{ending}"


def _short(text: str, room_px: float) -> str:
    length = int(room_px / _CHARACTER_PX)
    return text if len(text) <= length else f"{text[: length - 1]}…"
