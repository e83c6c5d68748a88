"""Pictures of a search: importances, learning curves, and who took whose weights."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.report.search_axes import short_name
from pipeline.report.search_importance import NUM_SHUFFLES, Importances
from pipeline.report.search_lines import lines_of
from pipeline.report.search_parallel import shades, wrapped_name
from pipeline.report.search_words import is_recall, metric_label, winner_of
from pipeline.report.style import LIGHT, Theme, new_figure, style_axes
from pipeline.search import SearchResult, SearchTrial

_ROW_PX = 34


def importance_figure(found: Importances, *, names: Sequence[str], theme: Theme = LIGHT) -> Figure:
    """Draw what each parameter explains beside the most that luck gave it.

    Args:
        found: At least one of them.
        names: Of all parameters, which are shortened as far as they stay distinct.
        theme: Colours.
    """
    rows = found.found
    figure = new_figure(width_px=760, height_px=130 + _ROW_PX * len(rows), background=theme.background)
    axes = figure.add_subplot()
    for row, importance in enumerate(rows):
        colour = theme.series[0] if importance.stands_out else theme.muted
        axes.barh(row, importance.share, height=0.56, color=colour, alpha=1 if importance.stands_out else 0.45)
        axes.plot([importance.by_luck] * 2, [row - 0.4, row + 0.4], color=theme.series[1], linewidth=2)
        note = "" if importance.num_trials == found.num_trials else f"   of the {importance.num_trials} that have it"
        axes.annotate(
            f"{importance.share:.0%}{note}",
            (max(importance.share, importance.by_luck), row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=theme.ink,
        )
    style_axes(
        axes,
        theme=theme,
        title="What explains the differences between the trials",
        x_label=f"share of the variance; orange: the most that luck gave it in {NUM_SHUFFLES} shuffles",
    )
    labels = [short_name(importance.name, names) for importance in rows]
    axes.set_yticks(range(len(rows)), [wrapped_name(label) for label in labels], parse_math=False)
    axes.tick_params(axis="y", labelsize=10, labelcolor=theme.ink)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    largest = max(max(importance.share, importance.by_luck) for importance in rows)
    axes.set_xlim(0, largest * 1.3 + 1e-3)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.tight_layout()
    return figure


def curves_figure(result: SearchResult, *, theme: Theme = LIGHT) -> Figure:
    """Draw the metric of every trial over its epochs, where trials were compared, and where they ended.

    Args:
        result: The search; at least one trial has an evaluation.
        theme: Colours.
    """
    figure = new_figure(width_px=1100, height_px=480, background=theme.background)
    axes = figure.add_subplot()
    shade_of = {line.trial.name: line.shade for line in lines_of(result).lines}
    colours = shades(theme)
    winner = winner_of(result)
    for trial in sorted((one for one in result.trials if one.name in shade_of), key=lambda one: shade_of[one.name]):
        is_best = winner is not None and trial.name == winner.name
        colour = theme.series[2] if is_best else colours[shade_of[trial.name]]
        _draw_curve(axes, trial, result.metric, colour=colour, is_best=is_best, theme=theme)
    for rung in result.rungs:
        axes.axvline(rung, color=theme.muted, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    if result.chance is not None:
        axes.axhline(result.chance, color=theme.series[1], linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
    title = "Learning curves" + ("; dotted upright: where trials were compared" if result.rungs else "")
    style_axes(axes, theme=theme, title=title, x_label="epoch", y_label=metric_label(result.metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if is_recall(result.metric):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(
        handles=_curve_handles(result, theme=theme), fontsize=9, labelcolor=theme.ink, frameon=False,
        loc="upper left", bbox_to_anchor=(1.01, 1),
    )  # fmt: skip
    figure.tight_layout()
    return figure


def _draw_curve(axes: Axes, trial: SearchTrial, metric: str, *, colour: str, is_best: bool, theme: Theme) -> None:
    epochs = [found["epoch"] for found in trial.evaluations]
    values = [found[metric] for found in trial.evaluations]
    axes.plot(
        epochs,
        values,
        color=colour,
        linewidth=3 if is_best else 1.6,
        marker="o",
        markersize=4.5 if is_best else 3,
        zorder=5 if is_best else 2,
        gid=trial.name,
    )
    marker = {"stopped": "X", "failed": "X", "running": ">"}.get(trial.status)
    if marker is not None:
        ink = theme.series[1] if trial.status == "failed" else colour
        axes.plot(epochs[-1:], values[-1:], marker, color=ink, ms=8, mec=theme.background, mew=0.8, zorder=4)


def _curve_handles(result: SearchResult, *, theme: Theme) -> list[Line2D]:
    blue, orange, green = theme.series[:3]
    statuses = {trial.status for trial in result.trials if trial.evaluations}
    handles = []
    if winner_of(result) is not None:
        handles.append(Line2D([], [], color=green, linewidth=3, marker="o", ms=4.5, label="winner"))
    handles.append(Line2D([], [], color=blue, linewidth=1.6, marker="o", ms=3, label="other trials, the best darkest"))
    ends = {
        "stopped": ("X", blue, "stopped early"),
        "failed": ("X", orange, "failed"),
        "running": (">", blue, "not over"),
    }
    for status, (marker, colour, label) in ends.items():
        if status in statuses:
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", ms=8, label=label))
    if result.chance is not None:
        handles.append(Line2D([], [], color=orange, linestyle=(0, (1, 2)), label=f"a guess, {result.chance:.2%}"))
    return handles


def lineage_figure(result: SearchResult, *, theme: Theme = LIGHT) -> Figure:
    """Draw which trial took whose weights last: an arrow from the donor to it.

    Args:
        result: A search by population; at least one trial has a donor.
        theme: Colours.
    """
    figure = new_figure(width_px=900, height_px=420, background=theme.background)
    axes = figure.add_subplot()
    place = {
        trial.name: (number, value)
        for number, trial in enumerate(result.trials)
        if (value := trial.best(result.metric)) is not None
    }
    for trial in result.trials:
        if trial.donor in place and trial.name in place:
            axes.annotate(
                "",
                place[trial.name],
                xytext=place[trial.donor],
                arrowprops={"arrowstyle": "-|>", "color": theme.muted, "connectionstyle": "arc3,rad=0.18",
                            "shrinkA": 6, "shrinkB": 7, "linewidth": 1.3},
            )  # fmt: skip
    for name, (number, value) in place.items():
        is_best = name == result.best
        axes.plot(number, value, "o", color=theme.series[2 if is_best else 0], ms=11 if is_best else 8, zorder=3)
    style_axes(
        axes,
        theme=theme,
        title="Whose weights a trial took last: from the donor, along the arrow",
        x_label="trial",
        y_label=f"{metric_label(result.metric)}, the best",
    )
    numbers = [number for number, _ in place.values()]
    axes.set_xlim(min(numbers) - 0.6, max(numbers) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.15)
    if is_recall(result.metric):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.tight_layout()
    return figure
