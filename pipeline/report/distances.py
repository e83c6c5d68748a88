"""Confusion by distance: how far from the true place the first answers lie, beside what guessing would give.

Shape letters: N queries, M references, D distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from cvft.retrieval import RetrievalResult
from pipeline.report.contents import BoolArray, FloatArray, IntArray
from pipeline.report.gallery import format_distance
from pipeline.report.style import LIGHT, Theme, new_figure, style_axes, style_legend

PROTOCOL_DISTANCES_M = (5.0, 25.0)
"""At which the field counts an answer as right: CVACT_test's distance, and visual place recognition's."""
_MAX_GUESSES = 4_000_000  # distances that are measured for what guessing gives
_CHUNK = 256
_MARKS_M = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 100_000, 1_000_000, 10_000_000)


@dataclass(frozen=True, kw_only=True)
class AnswerDistances:
    """How far first answers lie from the true place.

    Attributes:
        is_right: bool [N], whether the query's own reference comes first.
        answer_m: float64 [N], distance from the query to its first answer; infinite where a position is unknown.
        guess_m: float64 [.], sorted distances from queries to references that are not theirs, of which a guess would
            take one.
        guess_right: Probability that a guess takes the right reference.
    """

    is_right: BoolArray
    answer_m: FloatArray
    guess_m: FloatArray
    guess_right: float

    @property
    def wrong_m(self) -> FloatArray:
        """Distances of the wrong first answers, as far as they are known."""
        return self.answer_m[~self.is_right & np.isfinite(self.answer_m)]

    @property
    def wrong_guess_m(self) -> FloatArray:
        """Distances of wrong guesses, as far as they are known."""
        return self.guess_m[np.isfinite(self.guess_m)]

    @property
    def num_wrong(self) -> int:
        """Number of wrong first answers, whether their distance is known or not."""
        return int((~self.is_right).sum())

    def found_within(self, distances_m: Sequence[float] | FloatArray) -> FloatArray:
        """Return the part of the queries whose first answer is right or nearer than each distance, [D]."""
        return np.array([(self.is_right | (self.answer_m < distance)).mean() for distance in distances_m])

    def guessed_within(self, distances_m: Sequence[float] | FloatArray) -> FloatArray:
        """Return the same for a reference drawn at random, [D]."""
        nearer = np.searchsorted(self.guess_m, distances_m, side="left") / max(len(self.guess_m), 1)
        return np.asarray(self.guess_right + (1 - self.guess_right) * nearer)


def answer_distances(result: RetrievalResult, locations_m: FloatArray | None) -> AnswerDistances | None:
    """Measure how far first answers lie from the true place, and how far guesses would.

    As everywhere, equal scores count against the query: its own reference comes first only if it beats every other one,
    and of several equally good wrong ones the farthest is its answer, as far as the list of the best reaches. So
    `found_within` is the recall@1 of the protocol that accepts any reference within a distance.

    Args:
        result: How all queries of a split did; references are named by the row of their pair.
        locations_m: Position of every pair in metres, [N, 3], NaN where unknown.

    Returns:
        The distances; none where no position is known.
    """
    if locations_m is None or not np.isfinite(locations_m).any():
        return None
    target, top = result.target.numpy(), result.top_indices.numpy()
    is_right = result.match_rank.numpy() == 0
    distance_m = _distances_m(locations_m[:, None], locations_m[top])
    scores = result.top_scores.numpy()
    is_other = top != target[:, None]
    best = np.max(scores, axis=1, where=is_other, initial=-np.inf, keepdims=True)
    is_answer = is_other & (scores == best)
    wrong_m = np.max(distance_m, axis=1, where=is_answer, initial=0.0)
    right_m = _distances_m(locations_m, locations_m[target])
    return AnswerDistances(
        is_right=is_right,
        answer_m=np.where(is_right, right_m, wrong_m),
        guess_m=_guesses_m(target, locations_m),
        guess_right=1 / result.num_references,
    )


def _distances_m(one: FloatArray, other: FloatArray) -> FloatArray:
    distance_m = np.linalg.norm(one - other, axis=-1)
    return np.where(np.isnan(distance_m), np.inf, distance_m)


def _guesses_m(target: IntArray, locations_m: FloatArray) -> FloatArray:
    """Return the sorted distances from queries, all of them or evenly chosen ones, to every reference but theirs."""
    references = np.unique(target)
    number = min(len(target), max(_MAX_GUESSES // len(references), 1))
    queries = np.linspace(0, len(target) - 1, number).round().astype(np.int64)
    parts = [
        _distances_m(locations_m[rows][:, None], locations_m[references])[target[rows, None] != references]
        for rows in np.array_split(queries, -(-number // _CHUNK))
    ]
    return np.sort(np.concatenate(parts))


def distance_figure(found: AnswerDistances, *, theme: Theme = LIGHT) -> Figure:
    """Draw how far off wrong first answers are, and how many answers lie within any distance.

    Args:
        found: The distances; some must be known.
        theme: Colours.
    """
    figure = new_figure(width_px=1100, height_px=430, background=theme.background)
    wrong_axes, within_axes = figure.subplots(1, 2)
    limits_m = _limits_m(found)
    _draw_wrong(wrong_axes, found, limits_m, theme=theme)
    _draw_within(within_axes, found, limits_m, theme=theme)
    for axes in (wrong_axes, within_axes):
        axes.set_xscale("log")
        axes.set_xlim(*limits_m)
        axes.xaxis.set_major_locator(FixedLocator([mark for mark in _MARKS_M if limits_m[0] < mark <= limits_m[1]]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_distance(value)))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.tight_layout(w_pad=3)
    return figure


def _limits_m(found: AnswerDistances) -> tuple[float, float]:
    """From the least distance that is told apart to the farthest there is."""
    everything = np.concatenate([found.wrong_m, found.wrong_guess_m, [2 * max(PROTOCOL_DISTANCES_M)]])
    return 1.0, float(everything.max()) * 1.15


def _draw_wrong(axes: Axes, found: AnswerDistances, limits_m: tuple[float, float], *, theme: Theme) -> None:
    edges_m = np.geomspace(*limits_m, num=25)
    wrong_m, guess_m = (np.clip(values, limits_m[0], None) for values in (found.wrong_m, found.wrong_guess_m))
    if len(wrong_m):
        axes.hist(
            wrong_m,
            bins=edges_m.tolist(),
            weights=np.full(len(wrong_m), 1 / len(wrong_m)),
            color=theme.series[0],
            alpha=0.75,
            label=f"this model, median {format_distance(float(np.median(wrong_m)))}",
        )
    if len(guess_m):
        heights, _ = np.histogram(guess_m, bins=edges_m)
        axes.stairs(
            heights / len(guess_m),
            edges_m,
            color=theme.ink,
            linewidth=1.6,
            label=f"guessing, median {format_distance(float(np.median(guess_m)))}",
        )
    style_axes(
        axes,
        theme=theme,
        title="How far off the wrong first answers are",
        x_label="distance from the true place (logarithmic)",
        y_label=f"part of {len(wrong_m):,} wrong answers",
    )
    if axes.patches:
        style_legend(axes, theme=theme)


def _draw_within(axes: Axes, found: AnswerDistances, limits_m: tuple[float, float], *, theme: Theme) -> None:
    distances_m = np.unique(np.concatenate([np.geomspace(*limits_m, num=200), PROTOCOL_DISTANCES_M]))
    guessed = found.guessed_within(distances_m)
    recall = found.found_within(distances_m)
    axes.plot(distances_m, recall, color=theme.series[0], linewidth=2.4, label="this model")
    axes.plot(distances_m, guessed, color=theme.muted, linewidth=1.4, linestyle=(0, (4, 3)), label="guessing")
    axes.fill_between(distances_m, guessed, recall, color=theme.series[0], alpha=0.12, linewidth=0)
    for distance, value in zip(PROTOCOL_DISTANCES_M, found.found_within(PROTOCOL_DISTANCES_M), strict=True):
        axes.axvline(distance, color=theme.grid, linewidth=1.4, zorder=1)
        axes.plot(distance, value, marker="o", color=theme.series[0], markersize=6)
        axes.annotate(
            f"{value:.1%} at {distance:g} m",
            (distance, value),
            xytext=(-5, 8),
            textcoords="offset points",
            ha="right",
            fontsize=9.5,
            color=theme.ink,
        )
    style_axes(
        axes,
        theme=theme,
        title="How many first answers lie within a distance",
        x_label="distance from the true place (logarithmic)",
        y_label="recall@1 within it",
    )
    axes.set_ylim(0, 1.08)
    style_legend(axes, theme=theme, location="lower right")
