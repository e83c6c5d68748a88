"""The scene as two rasters, what is where and how high: the common ground of both views.

Shapes: S = canvas size in pixels; row 0 is the northern edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.noise import noise_tile, tiled_noise
from pipeline.synthetic.scene import Building, Car, Line, Material, Points, Scene, Street, rectangle
from pipeline.synthetic.streets import along, length_m

FIRST_BUILDING = 64  # label of building b's half towards its left, the next one is the other half
FIRST_CAR = 2048  # label of car c's body, the next one is its glass
_SHIFT = 4
_NODE_CLEAR_M = 9.0


@dataclass(frozen=True)
class Canvas:
    """Rasters of a scene, the camera in the middle.

    Attributes:
        labels: Material, building half or car part, uint16 [S, S].
        heights: Top of what stands there in metres, float32 [S, S]; without trees.
        px_per_m: Resolution.
        origin_px: World coordinates of the north-western corner in whole pixels (column, row), which anchors textures.
    """

    center: tuple[float, float]
    labels: NDArray[np.uint16]
    heights: NDArray[np.float32]
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

    def window(self, tile: NDArray[np.float32], *, tile_size: int) -> NDArray[np.float32]:
        """Return the part of a repeated texture that lies over the canvas, a view [S, S]."""
        row, column = (value % tile_size for value in self.texture_origin)
        return tile[row : row + self.size, column : column + self.size]

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

    def stroke(self, points: Points, label: int, *, width_m: float) -> None:
        """Paint a line."""
        thickness = max(1, round(width_m * self.px_per_m))
        cv2.polylines(self.labels, [self.pixels(points)], False, int(label), thickness=thickness, shift=_SHIFT)


def paint(scene: Scene, *, size_px: int, px_per_m: float) -> Canvas:
    """Rasterise everything of a scene but its trees and cars."""
    labels = np.zeros((size_px, size_px), np.uint16)
    canvas = Canvas(scene.center, labels, np.zeros((size_px, size_px), np.float32), px_per_m)
    flat = [patch for patch in scene.patches if patch.height_m == 0.0]
    for patch in flat:
        canvas.fill(patch.outline, patch.material)
    for line in scene.waters:
        canvas.stroke(line.points, line.material, width_m=line.width_m)
    for line in scene.lines:
        canvas.stroke(line.points, line.material, width_m=line.width_m)
    _paint_streets(canvas, scene.streets)
    for patch in scene.patches:
        if patch.height_m > 0.0:
            canvas.fill(patch.outline, patch.material, height_m=patch.height_m)
    for index, building in enumerate(scene.buildings):
        _paint_building(canvas, building, label=FIRST_BUILDING + 2 * index)
    _ruffle(canvas)
    return canvas


def with_cars(canvas: Canvas, cars: Sequence[Car]) -> Canvas:
    """Return a copy of a canvas with one day's cars on it."""
    copy = Canvas(canvas.center, canvas.labels.copy(), canvas.heights.copy(), canvas.px_per_m)
    for index, car in enumerate(cars):
        label, spot = FIRST_CAR + 2 * index, (car.east_m, car.north_m)
        unit = np.array([np.cos(car.angle), np.sin(car.angle)])
        body = rectangle(spot, half_length=car.length_m / 2, half_depth=car.width_m / 2, angle=car.angle)
        copy.fill(body, label, height_m=car.height_m * 0.62)
        cabin = np.array(spot) - unit * car.length_m * 0.05
        glass = {"half_depth": car.width_m * 0.42, "angle": car.angle}
        copy.fill(
            rectangle((cabin[0], cabin[1]), half_length=car.length_m * 0.3, **glass), label + 1, height_m=car.height_m
        )
        copy.fill(rectangle((cabin[0], cabin[1]), half_length=car.length_m * 0.19, **glass), label)
    return copy


def _paint_streets(canvas: Canvas, streets: Sequence[Street]) -> None:
    for road in streets:
        if road.pavement_m > 0:
            canvas.stroke(road.points, Material.PAVEMENT, width_m=road.width_m + 2 * road.pavement_m)
    for road in streets:
        if road.pavement_m > 0:
            canvas.stroke(road.points, Material.KERB, width_m=road.width_m + 0.5)
    for road in sorted(streets, key=lambda road: road.width_m):
        canvas.stroke(road.points, road.surface, width_m=road.width_m)
    for road in streets:
        for line in markings(road):
            canvas.stroke(line.points, line.material, width_m=line.width_m)


def _offset(road: Street, *, start_m: float, end_m: float, aside_m: float) -> Points:
    places, tangents = along(road.points, np.linspace(start_m, end_m, max(2, int((end_m - start_m) / 3))))
    shifted: Points = places + np.stack([-tangents[:, 1], tangents[:, 0]], axis=1) * aside_m
    return shifted


def markings(road: Street) -> list[Line]:
    """Return a street's painted lines: centre line, edges, crossings before both junctions."""
    total, half = length_m(road.points), road.width_m / 2
    start, end = _NODE_CLEAR_M, total - _NODE_CLEAR_M
    if road.marking == "none" or end - start < 6:
        return []
    found: list[Line] = []
    asides = {"dashed": [], "double": [-0.18, 0.18], "avenue": [-0.2, 0.2]}[road.marking]
    found += [Line(_offset(road, start_m=start, end_m=end, aside_m=a), Material.YELLOW_LINE, 0.16) for a in asides]
    if road.marking != "double":
        for at in np.arange(start, end - 2.5, 6.5):
            for aside in [0.0] if road.marking == "dashed" else [-half / 2, half / 2]:
                dash = _offset(road, start_m=at, end_m=at + 2.6, aside_m=aside)
                found.append(Line(dash, Material.WHITE_LINE, 0.16))
    if road.pavement_m == 0:
        edges = [_offset(road, start_m=start, end_m=end, aside_m=a) for a in (-half + 0.4, half - 0.4)]
        found += [Line(edge, Material.WHITE_LINE, 0.16) for edge in edges]
    if road.has_crossings:
        for at in (start - 1.6, end + 1.6 - 2.6):
            for aside in np.arange(-half + 0.7, half - 0.3, 1.05):
                bar = _offset(road, start_m=at - 0.6, end_m=at + 1.9, aside_m=float(aside))
                found.append(Line(bar, Material.WHITE_LINE, 0.5))
    return found


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
        cv2.polylines(canvas.labels, [edge], True, int(Material.PARAPET), thickness=2, shift=_SHIFT)
        cv2.polylines(canvas.labels, [edge], True, label, thickness=1, shift=_SHIFT)
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


@lru_cache(maxsize=1)
def canopy_tile() -> NDArray[np.float32]:
    """Return the tops of a closed forest as a tileable relief in 0..1, repeated: crowns beside and over each other."""
    tile = np.zeros((512, 512), np.float32)
    places = noise_tile("crowns", size=32, roughness=0.0)
    size = 29
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    dome = np.sqrt(np.clip(1 - x**2 - y**2, 0, None)).astype(np.float32)
    for k in range(32 * 32):
        row, column = divmod(k, 32)
        level = 0.35 + 0.16 * places[row, column]
        rows = (np.arange(size) + row * 16 + int(6 * places[column, row]) - size // 2) % 512
        columns = (np.arange(size) + column * 16 + int(6 * places[row, (column + 7) % 32]) - size // 2) % 512
        area = np.ix_(rows, columns)
        tile[area] = np.maximum(tile[area], np.where(dome > 0, level + 0.45 * dome, 0))
    tile += 0.05 * noise_tile("twigs", roughness=0.4)
    return np.tile(np.clip(tile, 0, 1.2), (4, 4))


def _ruffle(canvas: Canvas) -> None:
    """Give woods and hedges a living top."""
    wood = canvas.labels == Material.WOOD
    if wood.any():
        relief = canvas.window(canopy_tile(), tile_size=512)
        canvas.heights[wood] *= 0.62 + 0.5 * relief[wood]
    hedge = canvas.labels == Material.HEDGE
    if hedge.any():
        canvas.heights[hedge] *= 1 + 0.06 * canvas.window(tiled_noise("ground"), tile_size=512)[hedge]
