"""An ablation as a table in Markdown, and as a picture: every training a dot, every variant a line of them."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipeline.ablation import CONFIDENCE, VariantSummary
from pipeline.report.charts import RECALLS
from pipeline.report.style import DPI, LIGHT, Theme, new_figure, style_axes

_ROW_PX = 46


def ablation_table(summaries: Sequence[VariantSummary], *, metric: str = "recall_at_1") -> str:
    """Write the comparison as a Markdown table, recalls in per cent."""
    columns = list(dict.fromkeys([*RECALLS, metric]))
    seeds = sorted({seed for summary in summaries for seed in summary.values})
    titles = ["variant", *(RECALLS.get(name, name) for name in columns), f"{RECALLS.get(metric, metric)} - reference"]
    rows = [[*titles, "verdict"], ["---"] * (len(titles) + 1)]
    for summary in summaries:
        cells = [_with_spread(summary.means[name], summary.deviations[name]) for name in columns]
        rows.append([summary.variant, *cells, _difference(summary, 2), summary.verdict])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    note = (
        f"Mean and standard deviation over the seeds {', '.join(map(str, seeds))}, per cent; "
        f"differences with their {CONFIDENCE:.0%} interval, paired by seed."
    )
    return "\n".join([*lines, "", note, ""])


def _with_spread(mean: float, deviation: float | None) -> str:
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def ablation_figure(
    summaries: Sequence[VariantSummary],
    *,
    metric: str = "recall_at_1",
    chance: float | None = None,
    subtitle: str = "",
    theme: Theme = LIGHT,
) -> Figure:
    """Draw each variant's trainings and mean, in the given order from top to bottom.

    Args:
        summaries: Of all variants, the reference among them.
        metric: The key that they were compared by, for the axis.
        chance: What a guess reaches, drawn as a line.
        subtitle: What was trained on.
        theme: Colours.
    """
    figure = new_figure(width_px=980, height_px=150 + _ROW_PX * len(summaries), background=theme.background)
    axes = figure.add_subplot()
    reference = next((summary for summary in summaries if summary.difference is None), None)
    if reference is not None:
        axes.axvline(reference.means[metric], color=theme.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    if chance is not None:
        axes.axvline(chance, color=theme.series[1], linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    for row, summary in enumerate(summaries):
        mean = summary.means[metric]
        colour = {"better": theme.series[2], "worse": theme.series[1]}.get(summary.verdict, theme.series[0])
        axes.plot(list(summary.values.values()), [row] * len(summary.values), "o", color=colour, alpha=0.55, ms=7)
        axes.plot([mean, mean], [row - 0.28, row + 0.28], color=colour, linewidth=3, solid_capstyle="round")
        text = (
            f"{mean:.1%}"
            if summary.difference is None
            else f"{mean:.1%}   {_difference(summary, 1)}, {summary.verdict}"
        )
        axes.annotate(
            text,
            (max(*summary.values.values(), mean), row),
            xytext=(12, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=theme.ink,
        )
    label = RECALLS.get(metric, metric)
    style_axes(axes, theme=theme, title=f"{label} of each training, by variant", x_label=_axis(label, chance))
    axes.set_yticks(range(len(summaries)), [summary.variant for summary in summaries])
    axes.tick_params(axis="y", labelsize=10.5, labelcolor=theme.ink)
    axes.set_ylim(len(summaries) - 0.4, -0.6)
    largest = max(max(summary.values.values()) for summary in summaries)
    axes.set_xlim(0, max(largest * 1.45, 1e-3))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    figure.text(12 / 980, 8 / (figure.get_figheight() * DPI), subtitle, fontsize=8.5, color=theme.muted)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def _difference(summary: VariantSummary, decimals: int) -> str:
    if summary.difference is None:
        return ""
    spread = "" if summary.half_width is None else f" ± {100 * summary.half_width:.{decimals}f}"
    return f"{100 * summary.difference:+.{decimals}f}{spread}"


def _axis(label: str, chance: float | None) -> str:
    guess = "" if chance is None else f"; dotted: a guess, {chance:.2%}"
    return f"{label}; dashed: the reference's mean{guess}"
