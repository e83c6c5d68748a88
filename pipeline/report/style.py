"""The look of the pictures: themes, axes without clutter, and encoding without any global matplotlib state."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pipeline.report.contents import ImageArray

DPI = 100
RIGHT = "#40c057"
WRONG_AHEAD = "#fa5252"
WRONG_BEHIND = "#868e96"
LIGHT_TABLE = "#12171d"
"""Behind photographs, in both themes, so that one rendering serves both."""


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a chart; the page shows the one that the reader's system asks for."""

    ink: str
    muted: str
    grid: str
    background: str
    series: tuple[str, ...]


LIGHT = Theme(
    ink="#1b2430",
    muted="#5a6775",
    grid="#e3e8ed",
    background="#ffffff",
    series=("#0b6e99", "#d9480f", "#2b8a3e", "#862e9c"),
)
DARK = Theme(
    ink="#e6ebf0",
    muted="#9aa7b4",
    grid="#2d3640",
    background="#171d24",
    series=("#4db6e2", "#ffa24d", "#69db7c", "#da77f2"),
)


def new_figure(*, width_px: float, height_px: float, background: str) -> Figure:
    """Return an empty figure of the given size on its own Agg canvas."""
    figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI, facecolor=background)
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, *, theme: Theme, title: str, x_label: str = "", y_label: str = "") -> None:
    """Give a chart the house look: a title on the left, a light grid, two spines."""
    axes.set_facecolor(theme.background)
    axes.set_title(title, loc="left", fontsize=12, color=theme.ink, fontweight="bold", pad=10)
    axes.set_xlabel(x_label, fontsize=10, color=theme.muted)
    axes.set_ylabel(y_label, fontsize=10, color=theme.muted)
    axes.tick_params(colors=theme.muted, labelsize=9, length=0)
    axes.grid(visible=True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)


def style_legend(axes: Axes, *, theme: Theme, location: Literal["best", "lower right", "above"] = "best") -> None:
    """Add a legend without a frame's noise; `above` is one row beside the heading."""
    place: dict[str, Any] = {"loc": location}
    if location == "above":
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 8, "borderaxespad": 0.1}
    axes.legend(**place, fontsize=9, labelcolor=theme.ink, facecolor=theme.background, edgecolor="none")


def add_photo(
    figure: Figure, image: ImageArray, *, box_px: tuple[float, float, float, float], frame: str | None = None
) -> Axes:
    """Show an image at a place given in pixels from the figure's upper left corner.

    Args:
        figure: Where to draw.
        image: uint8 [H, W, 3].
        box_px: Left, top, width and height.
        frame: Colour of a thick frame; none draws no frame.
    """
    width, height = figure.get_size_inches() * DPI
    left, top, box_width, box_height = box_px
    axes = figure.add_axes((left / width, 1 - (top + box_height) / height, box_width / width, box_height / height))
    axes.imshow(image, aspect="auto", interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(frame is not None)
        spine.set_linewidth(4)
        spine.set_color(frame or "none")
    return axes


def add_label(figure: Figure, axes: Axes, text: str, *, at_top: bool = False) -> None:
    """Write `text` on a dark strip in a photo's lower (or upper) left corner, readable on any picture."""
    width, height = figure.get_size_inches() * DPI
    box = axes.get_position()
    figure.text(
        box.x0 + 10 / width,
        box.y1 - 10 / height if at_top else box.y0 + 10 / height,
        text,
        fontsize=9.5,
        color="#ffffff",
        va="top" if at_top else "bottom",
        parse_math=False,
        zorder=3,  # above lines that cross from one photo to another
        bbox={"boxstyle": "round,pad=0.35", "facecolor": "#0b0f14d9", "edgecolor": "none"},
    )


def rasterise(figure: Figure) -> Image.Image:
    """Draw a figure into an RGB image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba")
    width, height = figure.canvas.get_width_height()
    pixels = np.frombuffer(buffer.getvalue(), dtype=np.uint8).reshape(height, width, 4)
    return Image.fromarray(pixels[..., :3])


def data_uri(image: Image.Image, *, is_photo: bool) -> str:
    """Encode an image for embedding: JPEG for photographs, PNG for charts."""
    buffer = io.BytesIO()
    if is_photo:
        image.save(buffer, format="JPEG", quality=85, optimize=True)
    else:
        image.save(buffer, format="PNG")
    kind = "jpeg" if is_photo else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
