"""Where things of the world fall in the two views, and where the local metric plane lies on the globe.

Axes: east_m and north_m on a local plane, up_m above the ground. Azimuth is clockwise from north. A pixel coordinate is
continuous: pixel i covers [i, i + 1), so its centre is i + 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PanoramaGeometry:
    """A 360-degree equirectangular panorama, north in the middle, cut to a band around the horizon as in CVUSA.

    Attributes:
        width_px: Columns of the full circle; east is right of the centre, south is at both edges.
        height_px: Rows; the horizon is in the middle, a row spans the same angle as a column (+-32.7 degrees in all).
        camera_height_m: The camera's height above the ground.
    """

    width_px: int = 1232
    height_px: int = 224
    camera_height_m: float = 2.5

    @property
    def degrees_per_px(self) -> float:
        """Angle of one column and of one row."""
        return 360.0 / self.width_px

    def pixel_of(self, azimuth_deg: ArrayLike, elevation_deg: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return (column, row) of a direction; the column lies in [0, width_px)."""
        turn = np.asarray(azimuth_deg, dtype=np.float64) / self.degrees_per_px
        row = self.height_px / 2 - np.asarray(elevation_deg, dtype=np.float64) / self.degrees_per_px
        return np.mod(self.width_px / 2 + turn, self.width_px), row

    def direction_of(self, column: ArrayLike, row: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return (azimuth_deg in [-180, 180), elevation_deg) of a pixel coordinate."""
        azimuth = (np.asarray(column, dtype=np.float64) - self.width_px / 2) * self.degrees_per_px
        elevation = (self.height_px / 2 - np.asarray(row, dtype=np.float64)) * self.degrees_per_px
        return np.mod(azimuth + 180.0, 360.0) - 180.0, elevation

    def pixel_of_point(self, east_m: ArrayLike, north_m: ArrayLike, up_m: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return (column, row) of a point given relative to the ground under the camera."""
        east, north = np.asarray(east_m, dtype=np.float64), np.asarray(north_m, dtype=np.float64)
        rise = np.asarray(up_m, dtype=np.float64) - self.camera_height_m
        return self.pixel_of(np.degrees(np.arctan2(east, north)), np.degrees(np.arctan2(rise, np.hypot(east, north))))


@dataclass(frozen=True, kw_only=True)
class AerialGeometry:
    """A square orthographic image, north up, centred on the camera.

    Attributes:
        size_px: Rows and columns.
        extent_m: Width of the ground that it shows.
    """

    size_px: int = 750
    extent_m: float = 100.0

    @property
    def px_per_m(self) -> float:
        """Pixels per metre of ground."""
        return self.size_px / self.extent_m

    def pixel_of(self, east_m: ArrayLike, north_m: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return (column, row) of a ground point relative to the camera."""
        column = self.size_px / 2 + np.asarray(east_m, dtype=np.float64) * self.px_per_m
        return column, self.size_px / 2 - np.asarray(north_m, dtype=np.float64) * self.px_per_m

    def ground_of(self, column: ArrayLike, row: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return (east_m, north_m) relative to the camera of a pixel coordinate."""
        east = (np.asarray(column, dtype=np.float64) - self.size_px / 2) / self.px_per_m
        return east, (self.size_px / 2 - np.asarray(row, dtype=np.float64)) / self.px_per_m


@dataclass(frozen=True, kw_only=True)
class LocalPlane:
    """The tangent plane of the WGS84 ellipsoid at an origin: good to 0.1 % over the town's ten kilometres.

    Metres per degree are the usual series of the ellipsoid's radii of curvature (NIMA TR8350.2).
    """

    latitude_deg: float = 43.6
    longitude_deg: float = -91.2

    @property
    def metres_per_degree(self) -> tuple[float, float]:
        """Metres per degree of (latitude, longitude) at the origin."""
        phi = np.radians(self.latitude_deg)
        latitude = 111132.954 - 559.822 * np.cos(2 * phi) + 1.175 * np.cos(4 * phi)
        longitude = 111412.84 * np.cos(phi) - 93.5 * np.cos(3 * phi) + 0.118 * np.cos(5 * phi)
        return float(latitude), float(longitude)

    def to_degrees(self, east_m: ArrayLike, north_m: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return (latitude_deg, longitude_deg)."""
        per_latitude, per_longitude = self.metres_per_degree
        latitude = self.latitude_deg + np.asarray(north_m, dtype=np.float64) / per_latitude
        return latitude, self.longitude_deg + np.asarray(east_m, dtype=np.float64) / per_longitude

    def to_metres(self, latitude_deg: ArrayLike, longitude_deg: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return (east_m, north_m)."""
        per_latitude, per_longitude = self.metres_per_degree
        east = (np.asarray(longitude_deg, dtype=np.float64) - self.longitude_deg) * per_longitude
        return east, (np.asarray(latitude_deg, dtype=np.float64) - self.latitude_deg) * per_latitude
