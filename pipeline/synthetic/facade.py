"""What the panorama sees of walls: the exact place on the wall's plane, its windows, its share of the sun.

Shapes: V = buildings in view, W = columns of the panorama, P = pixels that see walls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.light import Day
from pipeline.synthetic.scene import Building

F32 = NDArray[np.float32]


_EDGE_M = 0.5  # without windows, at a wall's ends
_DOOR_SHARE = 0.22


@dataclass(frozen=True)
class Walls:
    """The walls of buildings along the columns of a panorama, [V, W].

    Attributes:
        distance_m: Exact distance of the wall that the column's ray enters by.
        facing: Cosine between its normal and the sun's azimuth direction.
        number: Number of the window axis that the ray meets, counted along the wall.
        aside: Distance from that axis in units of their pitch, 0 to 0.5; 1 where there are no windows.
        sharpness: 1 where windows are much larger than a pixel, less where they fade into the wall.
    """

    distance_m: F32
    facing: F32
    number: F32
    aside: F32
    sharpness: F32


def building_table(buildings: Sequence[Building], *, center: tuple[float, float]) -> dict[str, F32]:
    """Return the buildings' numbers as columns [B], their places relative to the camera."""
    names = [name for name in Building._fields if name not in ("roof", "wall")]
    table = {name: np.array([getattr(house, name) for house in buildings], np.float64) for name in names}
    table["east_m"] -= center[0]
    table["north_m"] -= center[1]
    columns = {name: column.astype(np.float32) for name, column in table.items()}
    columns["wall"] = np.array([house.wall for house in buildings], np.float32).reshape(-1, 3)
    return columns


def walls_along(table: dict[str, F32], *, azimuths: F32, px_angle: float, day: Day) -> Walls:
    """Return where the columns' rays meet the walls of buildings: the slab method in each building's own axes.

    Args:
        table: The buildings, columns of [V].
        azimuths: Azimuths in radians, [W].
        px_angle: Radians of one pixel.
        day: Gives the sun.
    """
    cos, sin = np.cos(table["angle"])[:, None], np.sin(table["angle"])[:, None]
    east, north = -table["east_m"][:, None], -table["north_m"][:, None]
    start_x, start_y = east * cos + north * sin, north * cos - east * sin
    ray_x = _not_zero(np.sin(azimuths) * cos + np.cos(azimuths) * sin)
    ray_y = _not_zero(np.cos(azimuths) * cos - np.sin(azimuths) * sin)
    half_x, half_y = table["half_length_m"][:, None], table["half_depth_m"][:, None]
    enter_x = (-np.sign(ray_x) * half_x - start_x) / ray_x
    enter_y = (-np.sign(ray_y) * half_y - start_y) / ray_y
    on_end = enter_x > enter_y
    distance = np.maximum(np.maximum(enter_x, enter_y), np.float32(0.3))
    along = np.where(on_end, start_y + distance * ray_y, start_x + distance * ray_x)
    half = np.where(on_end, half_y, half_x)
    sun_east, sun_north, _ = day.sun_direction
    sun_x, sun_y = sun_east * cos + sun_north * sin, sun_north * cos - sun_east * sin
    facing = np.where(on_end, -np.sign(ray_x) * sun_x, -np.sign(ray_y) * sun_y)
    pitch = table["window_pitch_m"][:, None]
    axis = (along + half) / np.where(pitch > 0, pitch, np.float32(1))
    number = np.floor(axis)
    has_windows = (pitch > 0) & (np.abs(along) < half - np.float32(_EDGE_M))
    aside = np.where(has_windows, np.abs(axis - number - np.float32(0.5)), np.float32(1))
    sharpness: F32 = np.clip(2.2 - 7 * px_angle * distance / np.maximum(pitch, np.float32(0.1)), 0.15, 1)
    return Walls(distance, facing, number, aside, sharpness)


def _not_zero(values: F32) -> F32:
    return np.where(np.abs(values) < 1e-6, np.float32(1e-6), values)


def _hash(*numbers: NDArray[Any]) -> F32:
    """Mix whole numbers into shares of one, uniform in 0..1."""
    mixed: NDArray[np.uint32] = np.zeros(1, np.uint32)
    for number in numbers:
        mixed = (mixed ^ number.astype(np.int32).astype(np.uint32)) * np.uint32(2654435761)
        mixed = mixed ^ (mixed >> np.uint32(15))
    share: F32 = (mixed >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)
    return share


def wall_colours(
    table: dict[str, F32], walls: Walls, *, index: NDArray[np.int64], column: NDArray[np.int64], up: F32, day: Day
) -> F32:
    """Return the colours of wall pixels with windows, doors and shop fronts in the day's light, [P, 3] before exposure.

    Args:
        table: The buildings.
        walls: Their walls along the columns.
        index: Building of each pixel, [P].
        column: Column of each pixel, [P].
        up: Height above the ground, [P].
        day: The light.
    """
    at = index * walls.facing.shape[1] + column
    colour = _with_windows(table, walls, index=index, at=at, up=up)
    sunny = np.float32(day.ambient * 0.88) + np.float32(day.sun) * np.maximum(walls.facing, 0)
    eaves = table["eaves_m"].take(index)
    light = sunny.take(at) * (np.float32(0.72) + np.float32(0.175) * np.clip(up, 0, 1.6))
    light[(up > eaves - 0.25) & (up < eaves)] *= np.float32(0.8)
    colour *= light[:, None]
    return colour


def _with_windows(
    table: dict[str, F32], walls: Walls, *, index: NDArray[np.int64], at: NDArray[np.int64], up: F32
) -> F32:
    floor = up / table["storey_m"].take(index)
    level = np.floor(floor)
    in_floor, aside = floor - level, walls.aside.take(at)
    is_ground = level < 1
    is_shop = is_ground & (table["is_shop"] > 0).take(index)
    house_width = np.float32(0.2) + np.float32(0.1) * _hash(table["half_length_m"] * 1000)
    width = np.where(is_shop, np.float32(0.42), house_width.take(index))
    tall = np.where(is_shop, np.float32(0.4), np.float32(0.26))
    off = np.abs(in_floor - np.where(is_shop, np.float32(0.42), np.float32(0.54)))
    is_below = up < (table["eaves_m"] - np.float32(0.3)).take(index)
    frame = (np.float32(0.09) / np.maximum(table["window_pitch_m"], np.float32(0.1))).take(index)
    is_opening = is_below & (aside < width + frame) & (off < tall + np.float32(0.04))
    is_glass = is_opening & (aside < width) & (off < tall)
    colour = table["wall"].take(index, axis=0)
    for chosen, is_pane in ((np.flatnonzero(is_glass), True), (np.flatnonzero(is_opening & ~is_glass), False)):
        sharp = walls.sharpness.take(at[chosen])[:, None]
        shade = _hash(index[chosen], walls.number.take(at[chosen]), level[chosen])[:, None]
        pane = np.array([58, 70, 84], np.float32) + shade * np.array([63, 70, 77], np.float32)
        colour[chosen] += ((pane if is_pane else np.float32(220)) - colour[chosen]) * sharp
    door_aside = np.where(_hash(walls.number, walls.facing * 1000) < _DOOR_SHARE, walls.aside, np.float32(1))
    is_door = is_below & is_ground & ~is_shop & (door_aside.take(at) < 0.2) & (in_floor < 0.78)
    colour[is_door] = (84, 60, 48)
    return colour
