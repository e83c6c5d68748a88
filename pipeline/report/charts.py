"""Charts of the report: where the pairs lie, how training went, recall against chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter, ScalarFormatter

from pipeline.geography import EARTH_RADIUS_M
from pipeline.report.contents import FloatArray, IntArray
from pipeline.report.style import LIGHT, Theme, new_figure, style_axes, style_legend

RECALLS = {
    "recall_at_1": "recall@1",
    "recall_at_5": "recall@5",
    "recall_at_10": "recall@10",
    "recall_at_1_percent": "recall@1 %",
}
"""Keys of the metrics and their printed names."""


def location_figure(locations_deg: Mapping[str, FloatArray], *, theme: Theme = LIGHT) -> Figure:
    """Draw where the pairs of each split were taken, on a plane around their mean.

    Args:
        locations_deg: Latitude and longitude for each split, [pairs, 2]; rows with NaN are left out.
        theme: Colours.
    """
    known = {split: rows[np.isfinite(rows).all(axis=1)] for split, rows in locations_deg.items()}
    everything = np.concatenate(list(known.values()))
    centre = everything.mean(axis=0)
    # Equirectangular around the mean latitude: a picture for the eye; distances are computed elsewhere.
    scale_m = np.radians(1.0) * EARTH_RADIUS_M * np.array([1.0, np.cos(np.radians(centre[0]))])
    extent_m = np.ptp(everything, axis=0).max() * scale_m[0]
    unit, divisor = ("km", 1000.0) if extent_m > 5000 else ("m", 1.0)
    figure = new_figure(width_px=620, height_px=460, background=theme.background)
    axes = figure.add_subplot()
    size = float(np.clip(9000 / len(everything), 2, 28))
    for colour, (split, rows) in zip(theme.series, known.items(), strict=False):
        north, east = ((rows - centre) * scale_m / divisor).T
        axes.scatter(east, north, s=size, color=colour, alpha=0.8, linewidths=0, label=f"{split} ({len(rows):,})")
    style_axes(axes, theme=theme, title="Where the pairs are", x_label=f"east ({unit})", y_label=f"north ({unit})")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=4,
        fontsize=9,
        labelcolor=theme.ink,
        frameon=False,
        markerscale=6 / size**0.5,
    )
    figure.tight_layout()
    return figure


def training_figure(history: Sequence[Mapping[str, Any]], *, theme: Theme = LIGHT) -> Figure:
    """Draw the loss and the validation recalls of each epoch.

    Args:
        history: One mapping per epoch with `epoch`, and `loss` and any of `RECALLS` where they were measured.
        theme: Colours.
    """
    figure = new_figure(width_px=1100, height_px=400, background=theme.background)
    loss_axes, recall_axes = figure.subplots(1, 2)
    _plot_epochs(loss_axes, history, key="loss", colour=theme.series[0], label="training loss")
    style_axes(loss_axes, theme=theme, title="Training loss", x_label="epoch")
    loss_axes.set_ylim(bottom=0)
    for colour, (key, label) in zip(theme.series, RECALLS.items(), strict=True):
        _plot_epochs(recall_axes, history, key=key, colour=colour, label=label)
    style_axes(recall_axes, theme=theme, title="Recall on the evaluation split", x_label="epoch")
    recall_axes.set_ylim(0, 1.02)
    recall_axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if recall_axes.lines:
        style_legend(recall_axes, theme=theme)
    for axes in (loss_axes, recall_axes):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout(w_pad=3)
    return figure


def _plot_epochs(axes: Axes, history: Sequence[Mapping[str, Any]], *, key: str, colour: str, label: str) -> None:
    rows = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
    if rows:
        epochs, values = zip(*rows, strict=True)
        axes.plot(epochs, values, color=colour, linewidth=2, marker="o", markersize=3.5, label=label)


def recall_figure(match_rank: IntArray, *, num_references: int, theme: Theme = LIGHT) -> Figure:
    """Draw recall@k for every k against what guessing would give.

    Args:
        match_rank: Place of the true reference of each query, 0 is first, [N].
        num_references: Number of references ranked.
        theme: Colours.
    """
    k = np.arange(1, num_references + 1)
    recall = np.searchsorted(np.sort(match_rank), k, side="left") / len(match_rank)
    figure = new_figure(width_px=620, height_px=430, background=theme.background)
    axes = figure.add_subplot()
    axes.plot(k, recall, color=theme.series[0], linewidth=2.4, label="this model", drawstyle="steps-post")
    chance = k / num_references
    dashes = (0, (4, 3))
    axes.plot(k, chance, color=theme.muted, linewidth=1.4, linestyle=dashes, label="guessing", drawstyle="steps-post")
    axes.fill_between(k, chance, recall, color=theme.series[0], alpha=0.12, linewidth=0, step="post")
    axes.set_xscale("log")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 1000, 10_000, 100_000) if tick <= num_references]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    for tick in (tick for tick in (1, 5, 10) if tick <= num_references):
        value = recall[tick - 1]
        axes.plot(tick, value, marker="o", color=theme.series[0], markersize=6)
        axes.annotate(
            f"{value:.1%}", (tick, value), xytext=(7, -13), textcoords="offset points", fontsize=9.5, color=theme.ink
        )
    style_axes(
        axes,
        theme=theme,
        title="How often the right place is among the first k",
        x_label=f"k, of {num_references:,} references (logarithmic)",
        y_label="recall@k",
    )
    axes.set_ylim(0, 1.03)
    axes.set_xlim(0.93, max(num_references, 2) * 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    style_legend(axes, theme=theme, location="lower right")
    figure.tight_layout()
    return figure
