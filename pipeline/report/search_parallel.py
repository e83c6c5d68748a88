"""Parallel coordinates of a search: every evaluated trial a line through its values to its metric."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

from pipeline.report.search_lines import NUM_SHADES, UNSET, Line, Lines, lines_of
from pipeline.report.search_words import metric_label
from pipeline.report.style import LIGHT, Theme, new_figure
from pipeline.search import SearchResult

_AXIS_PX = 150  # between two axes
_NAME_CHARACTERS = 19
_DASHED = (0, (4, 2.5))


def shades(theme: Theme) -> list[str]:
    """Return the colours from the least to the best metric."""
    low, high = (_channels(colour) for colour in (theme.grid, theme.series[0]))
    mixed = [0.25 + 0.75 * step / (NUM_SHADES - 1) for step in range(NUM_SHADES)]
    return ["#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(low, high, strict=True)) for part in mixed]


def _channels(colour: str) -> list[int]:
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def wrapped_name(name: str) -> str:
    """Break a dotted key into lines that fit above an axis; what is longer is cut in its middle."""
    lines: list[str] = []
    for part in name.split("."):
        part = part if len(part) <= _NAME_CHARACTERS else f"{part[:9]}…{part[-9:]}"
        if lines and len(lines[-1]) + 1 + len(part) <= _NAME_CHARACTERS:
            lines[-1] += f".{part}"
        else:
            lines.append(part)
    return ".\n".join(lines)


def parallel_figure(result: SearchResult, *, theme: Theme = LIGHT) -> Figure:
    """Draw every evaluated trial as a line through its values to its metric.

    Args:
        result: The search.
        theme: Colours.
    """
    drawn = lines_of(result)
    width_px = max(720, 130 + _AXIS_PX * (len(drawn.axes) - 1) + 90)
    figure = new_figure(width_px=width_px, height_px=520, background=theme.background)
    axes = figure.add_axes((70 / width_px, 0.07, (width_px - 190) / width_px, 0.7))
    axes.set_axis_off()
    axes.set_xlim(0, max(len(drawn.axes) - 1, 1))
    axes.set_ylim(UNSET - 0.04, 1.0)
    for column in range(len(drawn.axes)):
        _draw_axis(axes, drawn, column, theme=theme)
    colours = shades(theme)
    for line in drawn.lines:
        _draw_line(axes, line, colour=theme.series[2] if line.is_best else colours[line.shade])
    marked = [(column, place) for column, place in enumerate(drawn.default) if place is not None]
    if marked:
        axes.plot(
            *zip(*marked, strict=True), "D", color=theme.series[1], ms=7, mec=theme.background, zorder=6, clip_on=False
        )
    figure.text(20 / width_px, 0.95, f"{len(drawn.lines)} trials", fontsize=12, color=theme.ink, fontweight="bold")
    _legend_of_lines(figure, drawn, theme=theme)
    return figure


def _draw_axis(axes: Axes, drawn: Lines, column: int, *, theme: Theme) -> None:
    axis = drawn.axes[column]
    axes.plot([column, column], [0, 1], color=theme.muted, linewidth=1.2, zorder=1, clip_on=False)
    is_metric = column == len(drawn.axes) - 1
    axes.text(
        column,
        1.045,
        metric_label(axis.name) if is_metric else wrapped_name(axis.name),
        ha="center",
        va="bottom",
        fontsize=9,
        color=theme.ink,
        fontweight="bold" if is_metric else "normal",
        parse_math=False,
    )
    marks = [(tick.place, tick.text) for tick in axis.ticks]
    if drawn.has_unset[column]:
        marks.append((UNSET, "not set"))
    for place, text in marks:
        axes.annotate(
            text if len(text) <= _NAME_CHARACTERS else f"{text[: _NAME_CHARACTERS - 1]}…",
            (column, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=theme.muted,
            zorder=7,
            parse_math=False,
            annotation_clip=False,
            bbox={"boxstyle": "round,pad=0.12", "facecolor": theme.background, "edgecolor": "none", "alpha": 0.75},
        )


def _draw_line(axes: Axes, line: Line, *, colour: str) -> None:
    corners: list[tuple[float, float]] = [(0, line.places[0])]
    codes = [Outline.MOVETO]
    for column in range(1, len(line.places)):
        before, after = line.places[column - 1], line.places[column]
        corners += [(column - 0.55, before), (column - 0.45, after), (column, after)]
        codes += [Outline.CURVE4] * 3
    is_full = line.trial.status == "finished"
    axes.add_patch(
        PathPatch(
            Outline(corners, codes),
            facecolor="none",
            edgecolor=colour,
            linewidth=3.2 if line.is_best else 1.7 if is_full else 1.1,
            linestyle="solid" if is_full or line.is_best else _DASHED,
            alpha=0.95,
            zorder=5 if line.is_best else 2,
            clip_on=False,
        )
    )


def _legend_of_lines(figure: Figure, drawn: Lines, *, theme: Theme) -> None:
    handles = [
        Line2D([], [], color=theme.series[2], linewidth=3.2, label="winner"),
        Line2D([], [], color=theme.series[0], linewidth=1.7, label="trained to the end"),
        Line2D([], [], color=theme.series[0], linewidth=1.1, linestyle=_DASHED, label="not to the end"),
    ]
    if any(place is not None for place in drawn.default):
        handles.append(Line2D([], [], color=theme.series[1], marker="D", linestyle="none", label="the default"))
    figure.legend(
        handles=handles, loc="upper right", ncols=4, fontsize=9, labelcolor=theme.ink, frameon=False, borderaxespad=0.8
    )
