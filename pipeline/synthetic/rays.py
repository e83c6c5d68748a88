"""Casting a panorama's rays onto a height field: which sample of the ground each pixel sees first.

Shapes: K = samples along a ray, far to near; W = columns; H = rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.geometry import PanoramaGeometry

_NEAREST_M = 1.6
_NUM_SAMPLES = 264


@dataclass(frozen=True)
class Hits:
    """What the rays meet.

    Attributes:
        sample: Index of the first sample that hides the sky, -1 where there is none, int16 [H, W].
        heights: Height of the field at every sample, float32 [K, W].
    """

    sample: NDArray[np.int16]
    heights: NDArray[np.float32]


@dataclass(frozen=True)
class Rays:
    """The rays of a panorama over a canvas whose middle is the camera; constant, so made once.

    Attributes:
        geometry: The panorama.
        size: Canvas size in pixels.
        px_per_m: Canvas resolution.
    """

    geometry: PanoramaGeometry
    size: int
    px_per_m: float

    @cached_property
    def reach_m(self) -> float:
        """Distance of the farthest sample."""
        return self.size / 2 / self.px_per_m - 0.5

    @cached_property
    def radii(self) -> NDArray[np.float32]:
        """Distances of the samples, far to near and closer together near the camera, [K]."""
        return np.geomspace(self.reach_m, _NEAREST_M, _NUM_SAMPLES).astype(np.float32)

    @cached_property
    def azimuths(self) -> NDArray[np.float32]:
        """Azimuth of every column in radians, [W]."""
        degrees, _ = self.geometry.direction_of(np.arange(self.geometry.width_px) + 0.5, 0.0)
        return np.radians(degrees).astype(np.float32)

    @cached_property
    def slopes(self) -> NDArray[np.float32]:
        """Tangent of every row's elevation, [H]."""
        _, degrees = self.geometry.direction_of(0.0, np.arange(self.geometry.height_px) + 0.5)
        return np.tan(np.radians(degrees)).astype(np.float32)

    @cached_property
    def flat_index(self) -> NDArray[np.int32]:
        """Flat index into the canvas of every sample, [K, W]."""
        east = self.radii[:, None] * np.sin(self.azimuths)
        north = self.radii[:, None] * np.cos(self.azimuths)
        column = np.floor(self.size / 2 + east * self.px_per_m).astype(np.int32)
        row = np.floor(self.size / 2 - north * self.px_per_m).astype(np.int32)
        index: NDArray[np.int32] = row * np.int32(self.size) + column
        return index

    @cached_property
    def _row_scale(self) -> float:
        return float(1.0 / np.radians(self.geometry.degrees_per_px))

    @cached_property
    def _columns(self) -> NDArray[np.int32]:
        columns = np.arange(self.geometry.width_px, dtype=np.int32)
        return np.broadcast_to(columns, (_NUM_SAMPLES, len(columns))).copy()

    @cached_property
    def _samples(self) -> NDArray[np.int16]:
        samples = np.arange(_NUM_SAMPLES, dtype=np.int16)
        return np.broadcast_to(samples[:, None], (_NUM_SAMPLES, self.geometry.width_px)).copy()

    def cast(self, field: NDArray[np.float32]) -> Hits:
        """Return what every pixel sees of a height field [size, size] in metres.

        A sample of height h at distance r hides everything below its elevation atan((h - camera) / r). Each sample is
        put at the topmost row that it hides; a pixel sees the nearest of those put at or above it.
        """
        height, width = self.geometry.height_px, self.geometry.width_px
        heights = field.ravel().take(self.flat_index)
        row = heights - np.float32(self.geometry.camera_height_m)
        row *= (1 / self.radii)[:, None]
        np.arctan(row, out=row)
        row *= np.float32(-self._row_scale)
        row += np.float32(height / 2 - 0.5)
        place = np.ceil(row, out=row).clip(0, height, out=row).astype(np.int32)
        place *= width
        place += self._columns
        nearest = np.full((height + 1) * width, -1, np.int16)
        # Far to near: of the samples put at one place the last assigned, the nearest, stays.
        nearest[place.ravel()] = self._samples.ravel()
        sample = np.maximum.accumulate(nearest.reshape(height + 1, width)[:height], axis=0)
        return Hits(sample, heights)

    @cached_property
    def ground_rows(self) -> int:
        """The first row that looks at ground within reach."""
        return int(np.argmax(-self.geometry.camera_height_m / self.slopes.clip(max=-1e-6) < self.reach_m - 0.5))

    @cached_property
    def ground_distances(self) -> NDArray[np.float32]:
        """Exact distance of the flat ground for rows from `ground_rows` on, [H - ground_rows]."""
        distances: NDArray[np.float32] = -np.float32(self.geometry.camera_height_m) / self.slopes[self.ground_rows :]
        return distances

    @cached_property
    def ground_maps(self) -> list[tuple[int, int, NDArray[np.float32], NDArray[np.float32]]]:
        """Bands of rows (first, last + 1, canvas column, canvas row), band l for the canvas halved l times.

        A band takes the halving whose pixels are about as large as the rows' footprint on the ground.
        """
        distances = self.ground_distances
        angle = np.radians(self.geometry.degrees_per_px)
        footprint = np.sqrt(distances**2 / self.geometry.camera_height_m * angle * distances * angle)
        levels = np.clip(np.round(np.log2(footprint * self.px_per_m)), 0, 3).astype(int)
        bands = []
        for level in range(4):
            rows = np.flatnonzero(levels == level)
            first, last = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
            scale = self.px_per_m / 2**level
            east = distances[first:last, None] * np.sin(self.azimuths)
            north = distances[first:last, None] * np.cos(self.azimuths)
            middle = self.size / 2 / 2**level - 0.5
            start = self.ground_rows
            columns, lines = (middle + east * scale).astype(np.float32), (middle - north * scale).astype(np.float32)
            bands.append((start + first, start + last, columns, lines))
        return bands


@lru_cache(maxsize=2)
def rays_of(geometry: PanoramaGeometry, *, size: int, px_per_m: float) -> Rays:
    """Return the rays of a panorama over a canvas, made once per process."""
    return Rays(geometry, size, px_per_m)
