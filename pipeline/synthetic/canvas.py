"""The scene as two rasters, what is where and how high: the common ground of both views.

Shapes: S = canvas size in pixels; row 0 is the northern edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.scene import CAR_COLOURS, Building, Car, Line, Material, Points, Scene, Street, rectangle
from pipeline.synthetic.texture import raise_crowns, texture_of

FIRST_CAR = 32  # label of the body of a car of colour 0
FIRST_CABIN = FIRST_CAR + len(CAR_COLOURS)
CAR_GLASS = FIRST_CABIN + len(CAR_COLOURS)
FIRST_BUILDING = (
    CAR_GLASS + 1
)  # building b has two labels: its roof's left and right slope, or a flat roof and its edge
_SHIFT = 4


@dataclass(frozen=True)
class Canvas:
    """Rasters of a scene, the camera in the middle.

    Attributes:
        center: World coordinates of the middle, in metres.
        labels: Material, building half or car, uint8 [S, S].
        heights: Top of what stands there in metres, float32 [S, S]; without trees.
        texture: Factor on the albedo, float32 [S, S]: grain, furrows, crowns; anchored to the world.
        px_per_m: Resolution.
    """

    center: tuple[float, float]
    labels: NDArray[np.uint8]
    heights: NDArray[np.float32]
    texture: NDArray[np.float32]
    px_per_m: float

    @property
    def size(self) -> int:
        """S."""
        return int(self.labels.shape[0])

    @property
    def texture_origin(self) -> tuple[int, int]:
        """Row and column of the canvas's corner in the plane of textures."""
        column = round(self.center[0] * self.px_per_m) - self.size // 2
        return -round(self.center[1] * self.px_per_m) - self.size // 2, column

    def pixels(self, points: Points) -> NDArray[np.int32]:
        """Return OpenCV's fixed-point coordinates of world points [n, 2]; its integers are pixel centres."""
        offset = (points - self.center) * (self.px_per_m, -self.px_per_m) + (self.size / 2 - 0.5)
        return np.round(offset * (1 << _SHIFT)).astype(np.int32)

    def fill(self, outline: Points, label: int, *, height_m: float | None = None) -> None:
        """Paint a polygon."""
        pixels = [self.pixels(outline)]
        cv2.fillPoly(self.labels, pixels, int(label), shift=_SHIFT)
        if height_m is not None:
            cv2.fillPoly(self.heights, pixels, height_m, shift=_SHIFT)

    def stroke(self, curves: Sequence[Points], label: int, *, width_m: float) -> None:
        """Paint lines of one width."""
        thickness = max(1, round(width_m * self.px_per_m))
        ends = np.cumsum([len(curve) for curve in curves])[:-1]
        pixels = np.split(self.pixels(np.concatenate(curves)), ends)
        cv2.polylines(self.labels, pixels, False, int(label), thickness=thickness, shift=_SHIFT)


def paint(scene: Scene, *, size_px: int, px_per_m: float) -> Canvas:
    """Rasterise everything of a scene but its trees and cars."""
    shape = (size_px, size_px)
    rasters = np.zeros(shape, np.uint8), np.zeros(shape, np.float32), np.empty(shape, np.float32)
    canvas = Canvas(scene.center, *rasters, px_per_m)
    flat = [patch for patch in scene.patches if patch.height_m == 0.0]
    for patch in flat:
        canvas.fill(patch.outline, patch.material)
    _paint_lines(canvas, scene.waters)
    _paint_lines(canvas, scene.lines)
    _paint_streets(canvas, scene.streets)
    for patch in scene.patches:
        if patch.height_m > 0.0:
            canvas.fill(patch.outline, patch.material, height_m=patch.height_m)
    for index, building in enumerate(scene.buildings):
        _paint_building(canvas, building, label=FIRST_BUILDING + 2 * index)
    texture_of(canvas.labels, origin=canvas.texture_origin, px_per_m=px_per_m, out=canvas.texture)
    raise_crowns(canvas.labels, canvas.heights, origin=canvas.texture_origin)
    return canvas


def with_cars(canvas: Canvas, cars: Sequence[Car]) -> Canvas:
    """Return a copy of a canvas with one day's cars on it."""
    copy = Canvas(canvas.center, canvas.labels.copy(), canvas.heights.copy(), canvas.texture, canvas.px_per_m)
    if not cars:
        return copy
    pixels = copy.pixels(_car_outlines(cars).reshape(-1, 2)).reshape(len(cars), 3, 4, 2)
    for car, (body, glass, roof) in zip(cars, pixels, strict=True):
        cv2.fillPoly(copy.labels, [body], FIRST_CAR + car.colour, shift=_SHIFT)
        cv2.fillPoly(copy.labels, [glass], CAR_GLASS, shift=_SHIFT)
        cv2.fillPoly(copy.labels, [roof], FIRST_CABIN + car.colour, shift=_SHIFT)
        cv2.fillPoly(copy.heights, [body], car.height_m * 0.62, shift=_SHIFT)
        cv2.fillPoly(copy.heights, [glass], car.height_m, shift=_SHIFT)
    return copy


def _car_outlines(cars: Sequence[Car]) -> NDArray[np.float64]:
    """Return the outlines of bodies, windows and roofs, [C, 3, 4, 2]."""
    angle = np.array([car.angle for car in cars])
    unit = np.stack([np.cos(angle), np.sin(angle)], axis=1)[:, None, None, :]
    across = unit[..., ::-1] * (-1, 1)
    length = np.array([car.length_m for car in cars])[:, None, None, None]
    width = np.array([car.width_m for car in cars])[:, None, None, None]
    place = np.array([(car.east_m, car.north_m) for car in cars])[:, None, None, :]
    ends = np.array([(-0.5, 0.5, 0.5, -0.5), (-0.35, 0.25, 0.25, -0.35), (-0.28, 0.14, 0.14, -0.28)])[..., None]
    sides = np.array([0.5, 0.43, 0.44])[:, None, None] * np.array([-1, -1, 1, 1])[None, :, None]
    outlines: NDArray[np.float64] = place + unit * length * ends + across * width * sides
    return outlines


def _paint_streets(canvas: Canvas, streets: Sequence[Street]) -> None:
    for road in streets:
        if road.pavement_m > 0:
            canvas.stroke([road.points], Material.PAVEMENT, width_m=road.width_m + 2 * road.pavement_m)
    for road in streets:
        if road.pavement_m > 0:
            canvas.stroke([road.points], Material.KERB, width_m=road.width_m + 0.5)
    for road in sorted(streets, key=lambda road: road.width_m):
        canvas.stroke([road.points], road.surface, width_m=road.width_m)
    _paint_lines(canvas, [line for road in streets for line in road.markings])


def _paint_lines(canvas: Canvas, lines: Sequence[Line]) -> None:
    """Paint lines in their order, those of a kind that follow each other at once."""
    for (material, width_m), group in groupby(lines, key=lambda line: (line.material, line.width_m)):
        canvas.stroke([line.points for line in group], material, width_m=width_m)


def _paint_building(canvas: Canvas, building: Building, *, label: int) -> None:
    middle = (building.east_m, building.north_m)
    length, depth, angle = building.half_length_m, building.half_depth_m, building.angle
    corners = rectangle(middle, half_length=length, half_depth=depth, angle=angle)
    canvas.fill(corners, label, height_m=building.eaves_m)
    if building.rise_m > 0:
        ridge = (corners[[0, 1]] + corners[[3, 2]]) / 2
        canvas.fill(np.array([corners[0], corners[1], ridge[1], ridge[0]]), label + 1)
        _raise_gable(canvas, building, corners=corners, label=label)
        return
    if depth > 4:
        edge = canvas.pixels(corners)
        cv2.polylines(canvas.labels, [edge], True, label + 1, thickness=2, shift=_SHIFT)
        for along_m, across_m in ((-0.4, 0.2), (0.3, -0.35), (0.55, 0.4)):
            unit = np.array([np.cos(angle), np.sin(angle)])
            spot = np.array(middle) + unit * along_m * length + np.array([-unit[1], unit[0]]) * across_m * depth
            box = rectangle((spot[0], spot[1]), half_length=1.1, half_depth=0.8, angle=angle)
            canvas.fill(box, Material.ROOF_UNIT, height_m=building.eaves_m + 1.3)


def _raise_gable(canvas: Canvas, building: Building, *, corners: Points, label: int) -> None:
    pixels = canvas.pixels(corners) / (1 << _SHIFT)
    low = np.clip(np.floor(pixels.min(axis=0)).astype(int), 0, canvas.size)
    high = np.clip(np.ceil(pixels.max(axis=0)).astype(int) + 1, 0, canvas.size)
    if (high <= low).any():
        return
    window = np.s_[low[1] : high[1], low[0] : high[0]]
    east = (np.arange(low[0], high[0], dtype=np.float32) + 0.5 - canvas.size / 2) / canvas.px_per_m
    north = (canvas.size / 2 - np.arange(low[1], high[1], dtype=np.float32) - 0.5) / canvas.px_per_m
    sin, cos = np.float32(np.sin(building.angle)), np.float32(np.cos(building.angle))
    east -= np.float32(building.east_m - canvas.center[0])
    north -= np.float32(building.north_m - canvas.center[1])
    across = np.abs(north[:, None] * cos - east[None, :] * sin)
    slope = np.float32(building.rise_m / building.half_depth_m)
    top = np.float32(building.eaves_m + building.rise_m) - slope * across
    labels = canvas.labels[window]
    inside = (labels == label) | (labels == label + 1)
    np.copyto(canvas.heights[window], top, where=inside)
