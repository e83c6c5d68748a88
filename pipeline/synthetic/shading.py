"""A canvas in the light of a day: cast shadows, albedo, texture."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.canvas import FIRST_BUILDING, FIRST_CAR, Canvas, canopy_tile
from pipeline.synthetic.light import FIELD_STRIPES, Day, material_colours, material_roughness
from pipeline.synthetic.noise import tiled_noise
from pipeline.synthetic.scene import Building, Car, Material, Tree

_DOUBLINGS = 6
_TRUNK_SHARE = 0.3


def sunlight(canvas: Canvas, day: Day, *, trees: Sequence[Tree]) -> NDArray[np.float32]:
    """Return how much of the sun reaches the top of every place, 0..1 [S, S].

    The highest shadow over a place is found by doubling: max(H, H moved by d less the ray's drop), then by 2d, 4d, ...
    at half the resolution.
    """
    small = cv2.resize(canvas.heights, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_NEAREST)
    ground = small.copy()
    scale = canvas.px_per_m / 2
    for tree in trees:
        column, row = ((tree.east_m - canvas.center[0]) * scale, -(tree.north_m - canvas.center[1]) * scale)
        place = (round(small.shape[1] / 2 + column), round(small.shape[0] / 2 + row))
        cv2.circle(small, place, round(tree.radius_m * scale * 0.85), tree.height_m * 0.85, thickness=-1)
    shadow = small
    step_m = 1.5 / scale
    for k in range(_DOUBLINGS):
        away = step_m * 2**k
        column = -np.sin(day.sun_azimuth_rad) * away * scale
        row = np.cos(day.sun_azimuth_rad) * away * scale
        move = np.array([[1, 0, column], [0, 1, row]], np.float32)
        moved = cv2.warpAffine(shadow, move, shadow.shape[::-1], flags=cv2.INTER_NEAREST, borderValue=0.0)
        shadow = np.maximum(shadow, moved - np.float32(away * np.tan(day.sun_elevation_rad)))
    lit = (shadow <= ground + np.float32(0.25)).astype(np.float32)
    lit = cv2.blur(lit, (3, 3))
    return cv2.resize(lit, canvas.labels.shape[::-1], interpolation=cv2.INTER_LINEAR)


def _albedo_tables(
    day: Day, *, buildings: Sequence[Building], cars: Sequence[Car]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return albedo [L, 3] and roughness [L] of every label; roofs already carry the slope's share of the sun."""
    albedo = np.zeros((FIRST_CAR + 2 * len(cars) + 2, 3), np.float32)
    roughness = np.full(len(albedo), 0.035, np.float32)
    albedo[: len(Material)] = material_colours(day.season)
    roughness[: len(Material)] = material_roughness()
    sun = np.array(day.sun_direction)
    for index, house in enumerate(buildings):
        slope = np.arctan2(house.rise_m, house.half_depth_m)
        left = np.array([-np.sin(house.angle), np.cos(house.angle)])
        for half, side in ((0, 1.0), (1, -1.0)):
            normal = np.array([*(left * side * np.sin(slope)), np.cos(slope)])
            light = (day.ambient + day.sun * max(0.0, float(normal @ sun)) / sun[2]) / (day.ambient + day.sun)
            albedo[FIRST_BUILDING + 2 * index + half] = np.array(house.roof) * min(light, 1.3)
    for index, car in enumerate(cars):
        albedo[FIRST_CAR + 2 * index] = car.rgb
        albedo[FIRST_CAR + 2 * index + 1] = (44, 50, 58)
    return albedo * np.array(day.gains, np.float32), roughness


def _texture(canvas: Canvas, roughness: NDArray[np.float32]) -> NDArray[np.float32]:
    texture = 1 + canvas.window(tiled_noise("ground"), tile_size=512) * roughness[canvas.labels]
    present = np.bincount(canvas.labels.ravel(), minlength=len(Material))[: len(Material)] > 0
    if present[list(FIELD_STRIPES)].any():
        rows = _field_rows(canvas)
        field = (canvas.labels >= Material.FIELD_GREEN) & (canvas.labels <= Material.FIELD_MOWN)
        texture[field] *= rows[field]
    if present[Material.WOOD]:
        wood = canvas.labels == Material.WOOD
        texture[wood] *= 0.35 + 0.95 * canvas.window(canopy_tile(), tile_size=512)[wood]
    return texture


def _field_rows(canvas: Canvas) -> NDArray[np.float32]:
    """Return the furrows of the fields, in four directions by material, as factors [S, S]."""
    row, column = canvas.texture_origin
    y = (np.arange(canvas.size, dtype=np.float32) + row)[:, None] / np.float32(canvas.px_per_m)
    x = (np.arange(canvas.size, dtype=np.float32) + column)[None, :] / np.float32(canvas.px_per_m)
    turn = canvas.labels * np.float32(0.8)
    return 1 + 0.09 * np.sin((x * np.cos(turn) + y * np.sin(turn)) * np.float32(2 * np.pi / 1.9))


def lit_canvas(
    canvas: Canvas, day: Day, *, buildings: Sequence[Building], cars: Sequence[Car], lit: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Return the canvas as seen from straight above, without trees, RGB uint8 [S, S, 3]."""
    albedo, roughness = _albedo_tables(day, buildings=buildings, cars=cars)
    shade = _texture(canvas, roughness) * (np.float32(day.ambient) + np.float32(day.sun) * lit)
    planes = [np.minimum(albedo[:, c][canvas.labels] * shade, np.float32(255)).astype(np.uint8) for c in range(3)]
    return cv2.merge(planes)


def crop(canvas: Canvas, *, size_px: int) -> Canvas:
    """Return the middle of a canvas."""
    edge = (canvas.size - size_px) // 2
    window = np.s_[edge : edge + size_px, edge : edge + size_px]
    return Canvas(canvas.center, canvas.labels[window], canvas.heights[window], canvas.px_per_m)
