"""The lines of parallel coordinates, before anything draws them: one for each trial that was evaluated.

Places run from 0 (bottom) to 1 (top) of an axis; a parameter that a trial does not have stands at `UNSET`, below.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.report.search_axes import Axis, axis_of
from pipeline.report.search_words import is_recall
from pipeline.search import SearchResult, SearchTrial

UNSET = -0.14
_BAND = 0.5  # of a category's room, over which its lines are spread
_UNSET_BAND = 0.03
NUM_SHADES = 8


@dataclass(frozen=True, kw_only=True)
class Line:
    """A trial's line.

    Attributes:
        trial: The trial.
        places: Its place on every axis, the metric's last.
        value: The metric, the best of its evaluations.
        shade: How good that is, from 0 to `NUM_SHADES` - 1.
        is_best: Whether it is the winner's.
    """

    trial: SearchTrial
    places: tuple[float, ...]
    value: float
    shade: int
    is_best: bool


@dataclass(frozen=True, kw_only=True)
class Lines:
    """All that parallel coordinates show.

    Attributes:
        axes: The parameters' axes and the metric's, from left to right.
        lines: The best last, so that it lies on top.
        default: Place of the default's value on each axis but the metric's; None where it has none.
        has_unset: For each axis, whether a trial has no value there.
    """

    axes: tuple[Axis, ...]
    lines: tuple[Line, ...]
    default: tuple[float | None, ...]
    has_unset: tuple[bool, ...]


def lines_of(result: SearchResult) -> Lines:
    """Place every evaluated trial on every axis."""
    axes = [axis_of(parameter, result.trials) for parameter in result.parameters]
    values = {trial.name: value for trial in result.trials if (value := trial.best(result.metric)) is not None}
    metric = Axis(
        name=result.metric,
        low=min(values.values(), default=0.0),
        high=max(values.values(), default=1.0),
        is_share=is_recall(result.metric),
    )
    evaluated = [trial for trial in result.trials if trial.name in values]
    lines = [
        Line(
            trial=trial,
            places=(*(_place(axis, trial, spread=_spread(number, len(evaluated))) for axis in axes), height),
            value=values[trial.name],
            shade=min(int(height * NUM_SHADES), NUM_SHADES - 1),
            is_best=trial.name == result.best,
        )
        for number, trial in enumerate(evaluated)
        if (height := metric.place(values[trial.name])) is not None
    ]
    lines.sort(key=lambda line: (line.is_best, line.value))
    return Lines(
        axes=(*axes, metric),
        lines=tuple(lines),
        default=tuple(axis.place(one.default) for axis, one in zip(axes, result.parameters, strict=True)),
        has_unset=tuple(any(line.places[column] < 0 for line in lines) for column in range(len(axes) + 1)),
    )


def _spread(number: int, num_trials: int) -> float:
    """Return from -0.5 to 0.5 where among the trials of one category a line runs, so that they do not hide another."""
    return number / (num_trials - 1) - 0.5 if num_trials > 1 else 0.0


def _place(axis: Axis, trial: SearchTrial, *, spread: float) -> float:
    place = axis.place(trial.values[axis.name]) if axis.name in trial.values else None
    if place is None:
        return UNSET + _UNSET_BAND * spread
    return place + (_BAND * spread / len(axis.categories) if axis.categories else 0.0)
