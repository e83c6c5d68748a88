"""The vector description of a piece of town that both views are rendered from, and the materials it is made of.

Coordinates are metres east and north on the town's plane; angles are radians counter-clockwise from east.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  # [n, 2], east and north
Rgb = tuple[int, int, int]

CAR_COLOURS: tuple[Rgb, ...] = (
    (232, 232, 234), (196, 198, 200), (40, 42, 46), (84, 88, 94), (150, 30, 32), (34, 62, 120), (214, 206, 190),
    (60, 92, 70), (210, 168, 64), (120, 126, 134), (240, 240, 240), (24, 24, 28),
)  # fmt: skip


class Material(IntEnum):
    """What a piece of ground is made of; the colour depends on the season and the light of a view."""

    MEADOW = 0
    LAWN = 1
    FIELD_GREEN = 2
    FIELD_GOLD = 3
    FIELD_SOIL = 4
    FIELD_MOWN = 5
    WATER = 6
    SAND = 7
    GRAVEL = 8
    ASPHALT = 9
    ASPHALT_OLD = 10
    PAVEMENT = 11
    PLAZA = 12
    WHITE_LINE = 13
    YELLOW_LINE = 14
    WOOD = 15
    HEDGE = 16
    POOL = 17
    COURT_RED = 18
    COURT_GREEN = 19
    ROOF_UNIT = 20
    KERB = 21
    SOIL = 22


class Patch(NamedTuple):
    """A polygon of one material; `height_m` lifts it (hedges, woods)."""

    outline: Points
    material: Material
    height_m: float = 0.0


class Line(NamedTuple):
    """A stroke of one material and width: markings, paths, banks."""

    points: Points
    material: Material
    width_m: float


class CarSlot(NamedTuple):
    """A place where a car may stand on some day, with the probability that one does."""

    east_m: float
    north_m: float
    angle: float
    chance: float


class Street(NamedTuple):
    """A street between two junctions: its centre line, its cross-section, its markings and where cars stand on it."""

    points: Points
    width_m: float
    pavement_m: float
    surface: Material
    centre_paint: str = "none"  # or "dashed", "double", "avenue"
    has_crossings: bool = False
    markings: tuple[Line, ...] = ()
    slots: tuple[CarSlot, ...] = ()


class Building(NamedTuple):
    """A rectangular building; `angle` is the direction of its length, along which the ridge of a gable roof runs."""

    east_m: float
    north_m: float
    half_length_m: float
    half_depth_m: float
    angle: float
    eaves_m: float
    rise_m: float  # of the ridge above the eaves; 0 is a flat roof
    roof: Rgb
    wall: Rgb
    window_pitch_m: float  # 0 is a blank wall
    storey_m: float
    is_shop: bool


class Tree(NamedTuple):
    """A tree; `shade` in [0, 1) picks its sprite and its colour in every season."""

    east_m: float
    north_m: float
    radius_m: float
    height_m: float
    is_conifer: bool
    shade: float


class Car(NamedTuple):
    """A car on one day."""

    east_m: float
    north_m: float
    angle: float
    colour: int  # of CAR_COLOURS
    length_m: float = 4.5
    width_m: float = 1.85
    height_m: float = 1.5


@dataclass(kw_only=True)
class Scene:
    """Everything around one camera; lists are painted in their order, later over earlier.

    Attributes:
        center: The camera's place, (east_m, north_m): the middle of both views.
    """

    center: tuple[float, float]
    patches: list[Patch] = field(default_factory=list)
    waters: list[Line] = field(default_factory=list)
    streets: list[Street] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    buildings: list[Building] = field(default_factory=list)
    trees: list[Tree] = field(default_factory=list)
    slots: list[CarSlot] = field(default_factory=list)


def rectangle(center: tuple[float, float], *, half_length: float, half_depth: float, angle: float) -> Points:
    """Return the four corners of a turned rectangle, counter-clockwise, [4, 2]."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (half_length, half_depth)
    cos, sin = np.cos(angle), np.sin(angle)
    turned: Points = corners @ np.array([[cos, sin], [-sin, cos]]) + center
    return turned
