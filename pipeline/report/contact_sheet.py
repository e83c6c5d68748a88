"""A contact sheet: pairs as they lie in a shard, the ground image above the aerial one, with what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from pipeline.report.contents import ImageArray
from pipeline.report.style import DPI, LIGHT_TABLE, add_photo, new_figure

GROUND_WIDTH_PX = 400
AERIAL_WIDTH_PX = 200
_NUM_COLUMNS = 3
_GAP_PX = 24.0
_MAX_GROUND_HEIGHT_PX = 200.0
_LINE_PX = 16.5
_LINE_CHARACTERS = 26  # of 8.5 points, beside the aerial image
_TITLE_PX = 44.0
_INK = "#e6ebf0"
_MUTED = "#9aa7b4"


@dataclass(frozen=True, kw_only=True)
class Card:
    """One pair on the sheet.

    Attributes:
        ground: uint8 [H, W, 3].
        aerial: uint8 [H, W, 3].
        title: Its key.
        lines: What is known of it, one short fact a line.
    """

    ground: ImageArray
    aerial: ImageArray
    title: str
    lines: Sequence[str]


def contact_sheet(cards: Sequence[Card], *, title: str) -> Figure:
    """Draw cards in rows of three, 1,300 pixels wide."""
    ground_px = max(min(_scaled_height_px(card.ground, GROUND_WIDTH_PX), _MAX_GROUND_HEIGHT_PX) for card in cards)
    aerial_px = min(max(_scaled_height_px(card.aerial, AERIAL_WIDTH_PX) for card in cards), 2.0 * AERIAL_WIDTH_PX)
    card_px = ground_px + _LINE_PX / 4 + aerial_px
    num_columns = min(_NUM_COLUMNS, len(cards))
    num_rows = -(-len(cards) // num_columns)
    width_px = _GAP_PX + num_columns * (GROUND_WIDTH_PX + _GAP_PX)
    height_px = _TITLE_PX + num_rows * (card_px + _GAP_PX)
    figure = new_figure(width_px=width_px, height_px=height_px, background=LIGHT_TABLE)
    _write(figure, title, left_px=_GAP_PX, top_px=_TITLE_PX / 3, size=12.0, colour=_INK)
    for number, card in enumerate(cards):
        row, column = divmod(number, num_columns)
        left_px = _GAP_PX + column * (GROUND_WIDTH_PX + _GAP_PX)
        top_px = _TITLE_PX + row * (card_px + _GAP_PX)
        _draw(figure, card, left_px=left_px, top_px=top_px, ground_px=ground_px, aerial_px=aerial_px)
    return figure


def _draw(figure: Figure, card: Card, *, left_px: float, top_px: float, ground_px: float, aerial_px: float) -> None:
    height_px = min(_scaled_height_px(card.ground, GROUND_WIDTH_PX), ground_px)
    width_px = height_px * card.ground.shape[1] / card.ground.shape[0]
    add_photo(figure, card.ground, box_px=(left_px, top_px + ground_px - height_px, width_px, height_px))
    top_px += ground_px + _LINE_PX / 4
    height_px = min(_scaled_height_px(card.aerial, AERIAL_WIDTH_PX), aerial_px)
    width_px = height_px * card.aerial.shape[1] / card.aerial.shape[0]
    add_photo(figure, card.aerial, box_px=(left_px, top_px, width_px, height_px))
    left_px += AERIAL_WIDTH_PX + _LINE_PX / 2
    title = [card.title[start : start + _LINE_CHARACTERS] for start in range(0, len(card.title), _LINE_CHARACTERS)]
    for number, line in enumerate([*title, *card.lines]):
        colour = _INK if number < len(title) else _MUTED
        _write(figure, _fit(line), left_px=left_px, top_px=top_px + number * _LINE_PX, size=8.5, colour=colour)


def _scaled_height_px(image: ImageArray, width_px: float) -> float:
    height, width = image.shape[:2]
    return float(width_px * height / width)


def _fit(text: str, num_characters: int = _LINE_CHARACTERS) -> str:
    font = get_font(findfont("DejaVu Sans"))
    drawn = "".join(character if font.get_char_index(ord(character)) else "□" for character in text)
    return drawn if len(drawn) <= num_characters else f"{drawn[: num_characters - 1]}…"


def _write(figure: Figure, text: str, *, left_px: float, top_px: float, size: float, colour: str) -> None:
    width_px, height_px = figure.get_size_inches() * DPI
    place = (left_px / width_px, 1 - top_px / height_px)
    figure.text(*place, text, fontsize=size, color=colour, va="top", parse_math=False)
