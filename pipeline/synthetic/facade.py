"""What the panorama sees of walls: the exact place on the wall's plane, its windows, its share of the sun.

Shapes: P = pixels that see walls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.light import Day
from pipeline.synthetic.scene import Building

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Walls:
    """Places on walls: `along_m` from the wall's middle, `up_m` above the ground, `facing` the sun (cosine); [P]."""

    distance_m: F32
    along_m: F32
    up_m: F32
    half_m: F32
    facing: F32


def building_table(buildings: Sequence[Building], *, center: tuple[float, float]) -> dict[str, F32]:
    """Return the buildings' numbers as columns [B], their places relative to the camera."""
    names = [name for name in Building._fields if name not in ("roof", "wall")]
    table = {name: np.array([getattr(house, name) for house in buildings], np.float64) for name in names}
    table["east_m"] -= center[0]
    table["north_m"] -= center[1]
    columns = {name: column.astype(np.float32) for name, column in table.items()}
    columns["wall"] = np.array([house.wall for house in buildings], np.float32).reshape(-1, 3)
    return columns


def wall_places(
    table: dict[str, F32], *, index: NDArray[np.int64], azimuth: F32, slope: F32, camera_m: float, day: Day
) -> Walls:
    """Return where rays meet the walls of their buildings: the slab method in the building's own axes.

    Args:
        table: The buildings.
        index: Building of each pixel, [P].
        azimuth: Its azimuth in radians, [P].
        slope: Tangent of its elevation, [P].
        camera_m: The camera's height.
        day: Gives the sun.
    """
    cos, sin = np.cos(table["angle"])[index], np.sin(table["angle"])[index]
    east, north = -table["east_m"][index], -table["north_m"][index]
    start_x, start_y = east * cos + north * sin, north * cos - east * sin
    ray_east, ray_north = np.sin(azimuth), np.cos(azimuth)
    ray_x, ray_y = ray_east * cos + ray_north * sin, ray_north * cos - ray_east * sin
    tiny = np.float32(1e-6)
    ray_x, ray_y = np.where(np.abs(ray_x) < tiny, tiny, ray_x), np.where(np.abs(ray_y) < tiny, tiny, ray_y)
    half_x, half_y = table["half_length_m"][index], table["half_depth_m"][index]
    enter_x = (-np.sign(ray_x) * half_x - start_x) / ray_x
    enter_y = (-np.sign(ray_y) * half_y - start_y) / ray_y
    on_end = enter_x > enter_y
    distance = np.maximum(np.maximum(enter_x, enter_y), np.float32(0.3))
    along = np.where(on_end, start_y + distance * ray_y, start_x + distance * ray_x)
    sun_east, sun_north, _ = day.sun_direction
    sun_x, sun_y = sun_east * cos + sun_north * sin, sun_north * cos - sun_east * sin
    facing = np.where(on_end, -np.sign(ray_x) * sun_x, -np.sign(ray_y) * sun_y)
    up = camera_m + distance * slope
    return Walls(*(part.astype(np.float32) for part in (distance, along, up, np.where(on_end, half_y, half_x), facing)))


def _hash(*numbers: NDArray[np.int64]) -> F32:
    mixed = np.zeros_like(numbers[0])
    for number in numbers:
        mixed = (mixed * 31 + number) * 2654435761 % 4294967291
    share: F32 = (mixed % 1024).astype(np.float32) / np.float32(1024)
    return share


def wall_colours(
    table: dict[str, F32], walls: Walls, *, index: NDArray[np.int64], day: Day, px_angle: float, grain: F32
) -> F32:
    """Return the colours of wall pixels with windows, doors and shop fronts, [P, 3] before exposure.

    Args:
        table: The buildings.
        walls: Their places.
        index: Building of each pixel, [P].
        day: The light.
        px_angle: Radians of one pixel: windows smaller than it fade into their average.
        grain: Texture noise, [P].
    """
    eaves = table["eaves_m"][index]
    colour = _with_windows(table, walls, index=index, px_angle=px_angle, grain=grain)
    light = np.float32(day.ambient * 0.88) + np.float32(day.sun) * np.clip(walls.facing, 0, 1)
    light *= 0.72 + 0.28 * np.clip(walls.up_m / 1.6, 0, 1)
    light *= np.where((walls.up_m > eaves - 0.25) & (walls.up_m < eaves), np.float32(0.8), np.float32(1))
    shaded: F32 = (colour * light[:, None]).astype(np.float32)
    return shaded


def _with_windows(table: dict[str, F32], walls: Walls, *, index: NDArray[np.int64], px_angle: float, grain: F32) -> F32:
    pitch = table["window_pitch_m"][index]
    has_windows = (pitch > 0) & (walls.up_m < table["eaves_m"][index] - 0.3)
    has_windows &= np.abs(walls.along_m) < walls.half_m - 0.5
    safe = np.where(pitch > 0, pitch, 1)
    column, floor = (walls.along_m + walls.half_m) / safe, walls.up_m / table["storey_m"][index]
    in_column, in_floor = column - np.floor(column), floor - np.floor(floor)
    is_shop = (table["is_shop"][index] > 0) & (floor < 1)
    width = np.where(is_shop, np.float32(0.42), np.float32(0.2) + 0.1 * _hash(index))
    tall = np.where(is_shop, np.float32(0.4), np.float32(0.26))
    dx, dy = np.abs(in_column - 0.5), np.abs(in_floor - np.where(is_shop, 0.42, 0.54))
    is_glass = has_windows & (dx < width) & (dy < tall)
    is_frame = has_windows & ~is_glass & (dx < width + 0.09 / safe) & (dy < tall + 0.04)
    number = _hash(index, np.floor(column).astype(np.int64), np.floor(floor).astype(np.int64))
    is_door = has_windows & ~is_shop & (floor < 1) & (number < 0.22) & (dx < 0.2) & (in_floor < 0.78)
    sharp = np.clip(2.2 - 7 * walls.distance_m * px_angle / safe, 0.15, 1)[:, None].astype(np.float32)
    colour = table["wall"][index] * (1 + 0.025 * grain)[:, None]
    glass = np.array([58, 70, 84], np.float32) + number[:, None] * np.array([63, 70, 77], np.float32)
    colour += np.where(is_glass[:, None], (glass - colour) * sharp, 0)
    colour += np.where(is_frame[:, None], (np.float32(232) - colour) * sharp * np.float32(0.8), 0)
    return np.where(is_door[:, None], np.array([84, 60, 48], np.float32), colour)
