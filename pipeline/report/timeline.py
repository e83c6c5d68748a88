"""How many nodes a cluster had while jobs ran on it: a line per type of node, a band per job, a mark per loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.report.style import LIGHT, WRONG_AHEAD, Theme, new_figure, style_axes, style_legend

_WIDTH_PX, _HEIGHT_PX = 1100, 420


@dataclass(frozen=True)
class Stage:
    """One job on the cluster.

    Attributes:
        name: What it did.
        began_s: When it was submitted, in seconds from the beginning of the timeline.
        ended_s: When it was over.
    """

    name: str
    began_s: float
    ended_s: float


@dataclass(frozen=True)
class Mishap:
    """A node that was taken away in the middle of a job.

    Attributes:
        at_s: When, in seconds from the beginning of the timeline.
        group: Its type.
    """

    at_s: float
    group: str


def timeline_figure(
    samples: Sequence[tuple[float, Mapping[str, int]]],
    *,
    stages: Sequence[Stage],
    mishaps: Sequence[Mishap] = (),
    title: str = "Nodes of the cluster while jobs run",
    group: str = "{} nodes",
    mishap: str = "a node is killed",
    theme: Theme = LIGHT,
) -> Figure:
    """Draw the number of nodes over time.

    Args:
        samples: Time in seconds, and the number of nodes of each type then; a type that is missing has none.
        stages: Jobs, in the order of time.
        mishaps: Nodes that were lost.
        title: The heading.
        group: How the legend calls a type of node.
        mishap: What happened to them.
        theme: Colours.
    """
    figure = new_figure(width_px=_WIDTH_PX, height_px=_HEIGHT_PX, background=theme.background)
    axes = figure.add_subplot()
    times = [time for time, _ in samples]
    groups = sorted({name for _, nodes in samples for name in nodes})
    highest = max((number for _, nodes in samples for number in nodes.values()), default=1)
    colours = dict(zip(groups, theme.series * len(groups), strict=False))
    for name in groups:
        numbers = [nodes.get(name, 0) for _, nodes in samples]
        axes.step(times, numbers, where="post", color=colours[name], linewidth=2.2, label=group.format(name))
        axes.fill_between(times, numbers, step="post", color=colours[name], alpha=0.14, linewidth=0)
    for number, stage in enumerate(stages):
        label = "a job, from submission to end" if number == 0 else None
        axes.axvspan(stage.began_s, stage.ended_s, color=theme.grid, alpha=0.55, linewidth=0, zorder=0, label=label)
        middle = (stage.began_s + stage.ended_s) / 2
        axes.text(middle, highest + 0.62, stage.name, ha="center", va="top", fontsize=10, color=theme.ink)
    for number, lost in enumerate(mishaps):
        label = mishap if number == 0 else None
        height = _number_at(samples, lost)
        axes.plot(
            lost.at_s, height, marker="X", markersize=10, color=WRONG_AHEAD, linestyle="none", label=label, zorder=4
        )
    style_axes(axes, theme=theme, title=title, x_label="seconds", y_label="nodes")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, highest + 0.7)
    axes.set_xlim(0, max(times, default=1.0))
    if axes.lines:
        style_legend(axes, theme=theme, location="above")
    figure.tight_layout()
    return figure


def _number_at(samples: Sequence[tuple[float, Mapping[str, int]]], lost: Mishap) -> int:
    before = [nodes.get(lost.group, 0) for time, nodes in samples if time <= lost.at_s]
    return before[-1] if before else 0
