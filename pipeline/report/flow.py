"""The transport made visible: which part of the panorama goes to which cell of the aerial image.

Shape letters: n source positions of the panorama, m target cells of the aerial image, both row-major over their grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as CurvePath

from pipeline.report.contents import FloatArray, ImageArray, TransportExample
from pipeline.report.style import LIGHT_TABLE, add_label, add_photo, new_figure

WIDTH_PX = 1200.0
GAP_PX = 10.0
BRIDGE_PX = 56.0
"""Room between the panorama and the panels below, where the lines bend."""
NUM_CELLS = 6
MIN_SHARE = 0.08
MAX_PER_CELL = 3
TINT = 0.5


@dataclass(frozen=True, kw_only=True)
class Flow:
    """A strong flow: `share` of what aerial cell `target` receives comes from panorama position `source`."""

    source: int
    target: int
    share: float


def column_shares(plan: FloatArray) -> FloatArray:
    """Return what part of each target's mass comes from each source: [n, m] with columns that sum to one."""
    totals = plan.sum(axis=0, keepdims=True)
    return plan / np.where(totals > 0, totals, 1)


def effective_sources(plan: FloatArray) -> FloatArray:
    """Return how many sources feed each target: exp of its shares' entropy, 1 (a single one) to n (all alike), [m]."""
    shares = column_shares(plan.astype(np.float64))
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=0)
    effective: FloatArray = np.exp(entropy)
    return effective


def source_colours(grid: tuple[int, int]) -> FloatArray:
    """Return a colour for each panorama position: hue by column (direction), brightness by row, [n, 3] in 0 to 1."""
    rows, columns = np.indices(grid).reshape(2, -1)
    brightness = 0.4 + 0.6 * rows / max(grid[0] - 1, 1)
    return hsv_to_rgb(np.stack([columns / grid[1], np.full(rows.shape, 0.85), brightness], axis=1))


def target_colours(example: TransportExample) -> FloatArray:
    """Return for each aerial cell the mean colour of the positions it is fed from, weighted by the plan, [m, 3]."""
    return column_shares(example.plan).T @ source_colours(example.source_grid)


def strongest_flows(plan: FloatArray, target_grid: tuple[int, int]) -> list[Flow]:
    """List the strongest flows into cells that do not touch each other, strongest first.

    At most `NUM_CELLS` cells with `MAX_PER_CELL` flows each; none below a share of `MIN_SHARE`.
    """
    shares = column_shares(plan)
    cells: list[int] = []
    for cell in np.argsort(-shares.max(axis=0), kind="stable").tolist():
        if len(cells) < NUM_CELLS and all(_steps_apart(cell, other, target_grid) > 1 for other in cells):
            cells.append(cell)
    return [
        Flow(source=source, target=cell, share=float(shares[source, cell]))
        for cell in cells
        for source in np.argsort(-shares[:, cell], kind="stable")[:MAX_PER_CELL].tolist()
        if shares[source, cell] >= MIN_SHARE
    ]


def _steps_apart(cell: int, other: int, grid: tuple[int, int]) -> int:
    (row, column), (other_row, other_column) = divmod(cell, grid[1]), divmod(other, grid[1])
    return max(abs(row - other_row), abs(column - other_column))


def transport_figure(example: TransportExample, *, ground: ImageArray, aerial: ImageArray) -> Figure:
    """Draw the plan over both images.

    Above, the panorama with a colour for each position. Below, the aerial cells painted in the mean colour of what they
    receive, the aerial image with lines to some cells from where they are fed, and the plan as a matrix.

    Args:
        example: The plan and its grids.
        ground: Panorama, uint8 [H, W, 3].
        aerial: Aerial image, uint8 [H, W, 3].
    """
    inner_px = WIDTH_PX - 2 * GAP_PX
    panorama_height = min(inner_px * ground.shape[0] / ground.shape[1], 330.0)
    panorama_width = min(panorama_height * ground.shape[1] / ground.shape[0], inner_px)
    tile = (inner_px - 2 * GAP_PX) / 3
    top = GAP_PX + panorama_height + BRIDGE_PX
    figure = new_figure(width_px=WIDTH_PX, height_px=top + tile + GAP_PX, background=LIGHT_TABLE)
    left = (WIDTH_PX - panorama_width) / 2
    tinted = paint_cells(ground, source_colours(example.source_grid), example.source_grid)
    panorama_axes = add_photo(figure, tinted, box_px=(left, GAP_PX, panorama_width, panorama_height))
    painted = paint_cells(aerial, target_colours(example), example.target_grid)
    lefts = [GAP_PX + column * (tile + GAP_PX) for column in range(3)]
    painted_axes = add_photo(figure, painted, box_px=(lefts[0], top, tile, tile))
    aerial_axes = add_photo(figure, aerial, box_px=(lefts[1], top, tile, tile))
    plan_axes = add_photo(figure, plan_image(example.plan), box_px=(lefts[2], top, tile, tile))
    _draw_grid(panorama_axes, ground, example.source_grid)
    for axes in (painted_axes, aerial_axes):
        _draw_grid(axes, aerial, example.target_grid)
    _draw_flows(figure, example, panorama_axes=panorama_axes, aerial_axes=aerial_axes, ground=ground, aerial=aerial)
    add_label(figure, panorama_axes, f"query {example.index} · every part of the panorama has its colour", at_top=True)
    add_label(figure, painted_axes, "each cell in the mean colour of what it receives")
    add_label(figure, aerial_axes, "where some of the cells are fed from")
    n, m = example.plan.shape
    add_label(figure, plan_axes, f"the plan: {n} panorama rows, {m} aerial columns")
    return figure


def paint_cells(image: ImageArray, colours: FloatArray, grid: tuple[int, int]) -> ImageArray:
    """Tint an image by cells: its brightness stays, its colour is half its cell's.

    Args:
        image: uint8 [H, W, 3].
        colours: One colour for each cell, [rows * columns, 3] in 0 to 1.
        grid: Rows and columns.
    """
    height, width = image.shape[:2]
    rows = np.arange(height) * grid[0] // height
    columns = np.arange(width) * grid[1] // width
    cells = colours.reshape(*grid, 3)[rows[:, None], columns[None, :]]
    grey = image.mean(axis=2, keepdims=True) / 255
    mixed: FloatArray = (1 - TINT) * grey + TINT * cells
    return to_uint8(mixed * 255)


def to_uint8(values: FloatArray) -> ImageArray:
    """Round values between 0 and 255."""
    rounded: ImageArray = np.rint(values).astype(np.uint8)
    return rounded


def plan_image(plan: FloatArray) -> ImageArray:
    """Return the plan as a picture: each target's shares, 0 black to 1 pale yellow by square root, unsmoothed."""
    level = np.sqrt(column_shares(plan))
    ramp = np.array([[13, 17, 23], [91, 33, 122], [214, 69, 65], [255, 201, 71], [255, 250, 214]], dtype=np.float64)
    stops = np.linspace(0, 1, len(ramp))
    colours = np.stack([np.interp(level, stops, ramp[:, channel]) for channel in range(3)], axis=-1)
    factor = max(1, 384 // max(plan.shape))
    return to_uint8(colours).repeat(factor, axis=0).repeat(factor, axis=1)


def _draw_grid(axes: Axes, image: ImageArray, grid: tuple[int, int]) -> None:
    height, width = image.shape[:2]
    for row in range(1, grid[0]):
        axes.axhline(row * height / grid[0] - 0.5, color="#ffffff", alpha=0.35, linewidth=0.7)
    for column in range(1, grid[1]):
        axes.axvline(column * width / grid[1] - 0.5, color="#ffffff", alpha=0.35, linewidth=0.7)


def _cell_centre(cell: int, image: ImageArray, grid: tuple[int, int]) -> tuple[float, float]:
    row, column = divmod(cell, grid[1])
    return (column + 0.5) * image.shape[1] / grid[1] - 0.5, (row + 0.5) * image.shape[0] / grid[0] - 0.5


def _draw_flows(
    figure: Figure,
    example: TransportExample,
    *,
    panorama_axes: Axes,
    aerial_axes: Axes,
    ground: ImageArray,
    aerial: ImageArray,
) -> None:
    colours = source_colours(example.source_grid)
    bridge = figure.transFigure.inverted()
    for flow in strongest_flows(example.plan, example.target_grid):
        colour = tuple(colours[flow.source] / colours[flow.source].max())
        start = _cell_centre(flow.source, ground, example.source_grid)
        end = _cell_centre(flow.target, aerial, example.target_grid)
        _outline(aerial_axes, aerial, example.target_grid, flow.target)
        begin_x, begin_y = bridge.transform(panorama_axes.transData.transform(start))
        end_x, end_y = bridge.transform(aerial_axes.transData.transform(end))
        middle_y = (panorama_axes.get_position().y0 + aerial_axes.get_position().y1) / 2
        curve = CurvePath(
            [(begin_x, begin_y), (begin_x, middle_y), (end_x, middle_y), (end_x, end_y)],
            [CurvePath.MOVETO, CurvePath.CURVE4, CurvePath.CURVE4, CurvePath.CURVE4],
        )
        for line_colour, extra in (("#0b0f14", 1.6), (colour, 0.0)):
            width = 1.2 + 4.0 * flow.share + extra
            figure.add_artist(
                PathPatch(curve, transform=figure.transFigure, fill=False, edgecolor=line_colour, linewidth=width)
            )
        aerial_axes.plot(*end, marker="o", color=colour, markersize=5, markeredgecolor="#0b0f14")


def _outline(axes: Axes, image: ImageArray, grid: tuple[int, int], cell: int) -> None:
    width, height = image.shape[1] / grid[1], image.shape[0] / grid[0]
    x, y = _cell_centre(cell, image, grid)
    axes.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, fill=False, edgecolor="#ffffff", lw=1.6))
