"""A canvas in the light of a day: cast shadows and albedo. Shapes: S = canvas size."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.canvas import CAR_GLASS, FIRST_BUILDING, FIRST_CAR, Canvas
from pipeline.synthetic.light import Day, material_colours
from pipeline.synthetic.scene import CAR_COLOURS, Building, Material, Tree

F32 = NDArray[np.float32]
_DOUBLINGS = 6


def light_on(canvas: Canvas, day: Day, *, trees: Sequence[Tree]) -> F32:
    """Return the light on the top of every place, of the sky and of the sun where it reaches, [S, S].

    The highest shadow over a place is found by doubling: max(H, H moved by d less the ray's drop), then by 2d, 4d, ...
    at half the resolution.
    """
    ground = cv2.resize(canvas.heights, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_NEAREST)
    shadow = ground.copy()
    scale, half = canvas.px_per_m / 2, len(ground) / 2
    for tree in trees:
        column = half + (tree.east_m - canvas.center[0]) * scale
        row = half - (tree.north_m - canvas.center[1]) * scale
        radius = round(tree.radius_m * scale * 0.85)
        cv2.circle(shadow, (round(column), round(row)), radius, tree.height_m * 0.85, thickness=-1)
    for k in range(_DOUBLINGS):
        away_px = 1.5 * 2**k
        column, row = -np.sin(day.sun_azimuth_rad) * away_px, np.cos(day.sun_azimuth_rad) * away_px
        move = np.array([[1, 0, column], [0, 1, row]], np.float32)
        moved = cv2.warpAffine(shadow, move, shadow.shape[::-1], flags=cv2.INTER_NEAREST, borderValue=0.0)
        moved -= np.float32(away_px / scale * np.tan(day.sun_elevation_rad))
        shadow = cv2.max(shadow, moved)
    lit = cv2.blur((shadow <= ground + np.float32(0.25)).astype(np.float32), (3, 3))
    light: F32 = cv2.resize(lit * np.float32(day.sun) + np.float32(day.ambient), canvas.labels.shape[::-1])
    return light


def _albedo_table(day: Day, *, buildings: Sequence[Building]) -> NDArray[np.uint8]:
    """Return the albedo of every label, uint8 [256, 3]; roofs already carry their slope's share of the sun."""
    albedo = np.zeros((256, 3), np.float32)
    albedo[: len(Material)] = material_colours(day.season)
    albedo[FIRST_CAR:CAR_GLASS] = CAR_COLOURS * 2
    albedo[CAR_GLASS] = (44, 50, 58)
    sun = np.array(day.sun_direction)
    for index, house in enumerate(buildings):
        slope = np.arctan2(house.rise_m, house.half_depth_m)
        left = np.array([-np.sin(house.angle), np.cos(house.angle)])
        for half, side in ((0, 1.0), (1, -1.0)):
            normal = np.array([*(left * side * np.sin(slope)), np.cos(slope)])
            light = (day.ambient + day.sun * max(0.0, float(normal @ sun)) / sun[2]) / (day.ambient + day.sun)
            edge = 1.2 if house.rise_m == 0 and half == 1 else 1.0
            albedo[FIRST_BUILDING + 2 * index + half] = np.array(house.roof) * min(light, 1.3) * edge
    return np.minimum(albedo * np.array(day.gains, np.float32), 255).astype(np.uint8)


def lit_canvas(canvas: Canvas, day: Day, *, buildings: Sequence[Building], light: F32) -> NDArray[np.uint8]:
    """Return the canvas as seen from straight above, without trees, RGB uint8 [S, S, 3]."""
    albedo = _albedo_table(day, buildings=buildings)
    shade = canvas.texture * light
    planes = [cv2.LUT(canvas.labels, np.ascontiguousarray(albedo[:, c])) for c in range(3)]
    image: NDArray[np.uint8] = cv2.merge([cv2.multiply(plane, shade, dtype=cv2.CV_8U) for plane in planes])
    return image
