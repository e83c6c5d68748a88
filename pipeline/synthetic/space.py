"""Free room inside one block of the town: what is not street, water, building or garden wall yet."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.scene import Line, Points, Street, rectangle

_PX_PER_M = 2.0
_SHIFT = 4


class FreeSpace:
    """A small raster of the block in which things claim their place one after another.

    Args:
        outline: The block's border, [n, 2] in metres.
        streets: Streets along or through it; their pavements and a strip of `verge_m` are taken.
        waters: Water lines through it.
    """

    def __init__(self, outline: Points, *, streets: list[Street], waters: list[Line], verge_m: float = 0.2) -> None:
        self._origin = outline.min(axis=0) - 2.0
        width, height = np.ceil((outline.max(axis=0) + 2.0 - self._origin) * _PX_PER_M).astype(int)
        self._free: NDArray[np.uint8] = np.zeros((height, width), np.uint8)
        cv2.fillPoly(self._free, [self._pixels(outline)], 1, shift=_SHIFT)
        for road in streets:
            self._stroke(road.points, road.width_m + 2 * (road.pavement_m + verge_m))
        for water in waters:
            self._stroke(water.points, water.width_m + 2.0)

    def _pixels(self, points: Points) -> NDArray[np.int32]:
        pixels: NDArray[np.int32] = np.round((points - self._origin) * (_PX_PER_M * (1 << _SHIFT))).astype(np.int32)
        return pixels

    def _stroke(self, points: Points, width_m: float) -> None:
        thickness = max(1, round(width_m * _PX_PER_M))
        cv2.polylines(self._free, [self._pixels(points)], False, 0, thickness=thickness, shift=_SHIFT)

    def claim(self, outline: Points, *, margin_m: float = 0.0) -> bool:
        """Take a polygon with a margin if all of it is free, and say whether it was."""
        mask = np.zeros_like(self._free)
        cv2.fillPoly(mask, [self._pixels(outline)], 1, shift=_SHIFT)
        low = self._pixels(outline).min(axis=0) >> _SHIFT
        high = self._pixels(outline).max(axis=0) >> _SHIFT
        if (low < 0).any() or high[0] >= mask.shape[1] or high[1] >= mask.shape[0]:
            return False
        window = np.s_[low[1] : high[1] + 1, low[0] : high[0] + 1]
        if (mask[window] > self._free[window]).any():
            return False
        self._free[mask > 0] = 0
        if margin_m > 0:
            thickness = max(1, round(2 * margin_m * _PX_PER_M))
            cv2.polylines(self._free, [self._pixels(outline)], True, 0, thickness=thickness, shift=_SHIFT)
        return True

    def claim_box(
        self, center: tuple[float, float], *, half_length: float, half_depth: float, angle: float, margin_m: float
    ) -> bool:
        """Take a turned rectangle with a margin if it is free, and say whether it was."""
        box = rectangle(center, half_length=half_length, half_depth=half_depth, angle=angle)
        return self.claim(box, margin_m=margin_m)

    def is_free(self, points: Points) -> NDArray[np.bool_]:
        """Say for each point [n, 2] whether nothing stands there."""
        column, row = np.floor((points - self._origin) * _PX_PER_M).astype(int).T
        inside = (column >= 0) & (row >= 0) & (column < self._free.shape[1]) & (row < self._free.shape[0])
        found: NDArray[np.bool_] = inside & (self._free[row * inside, column * inside] > 0)
        return found

    def random_places(self, random: np.random.Generator, *, count: int) -> Points:
        """Return those of `count` places drawn over the block's box that are free, [n, 2]."""
        extent = np.array(self._free.shape[::-1]) / _PX_PER_M
        places: Points = self._origin + random.random((count, 2)) * extent
        return places[self.is_free(places)]

    def regions(self, *, inset_m: float) -> list[Points]:
        """Return the outlines of what is free and at least `inset_m` from what is taken, polygons [n, 2]."""
        size = 2 * round(inset_m * _PX_PER_M) + 1
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
        inner = cv2.erode(self._free, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
        contours, _ = cv2.findContours(inner, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        big = [contour[::6, 0].astype(np.float64) for contour in contours if cv2.contourArea(contour) > 160]
        return [(contour + 0.5) / _PX_PER_M + self._origin for contour in big]
