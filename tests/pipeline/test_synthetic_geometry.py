"""The two views' geometry and the local plane against formulas written down independently."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.synthetic.geometry import AerialGeometry, LocalPlane, PanoramaGeometry


@pytest.mark.parametrize(
    ("azimuth_deg", "column"), [(0.0, 616.0), (90.0, 924.0), (-90.0, 308.0), (180.0, 0.0), (-180.0, 0.0)]
)
def test_north_is_the_middle_column_and_east_is_right_of_it(azimuth_deg: float, column: float) -> None:
    found, row = PanoramaGeometry().pixel_of(azimuth_deg, 0.0)
    assert (float(found), float(row)) == (column, 112.0)


def test_directions_and_pixels_of_a_panorama_are_inverse() -> None:
    geometry = PanoramaGeometry()
    random = np.random.default_rng(1)
    column, row = random.uniform(0, 1232, 500), random.uniform(0, 224, 500)
    back = geometry.pixel_of(*geometry.direction_of(column, row))
    np.testing.assert_allclose(back, (column, row), atol=1e-9)


def test_a_point_on_the_ground_has_the_depression_of_the_camera_over_its_distance() -> None:
    geometry = PanoramaGeometry(camera_height_m=2.5)
    column, row = geometry.pixel_of_point(10.0, 10.0, 0.0)
    _, elevation_deg = geometry.direction_of(column, row)
    assert float(column) == pytest.approx(616 + 45 * 1232 / 360)
    assert np.tan(np.radians(-elevation_deg)) == pytest.approx(2.5 / np.hypot(10, 10))


def test_aerial_north_is_up_and_east_is_right_at_the_image_scale() -> None:
    geometry = AerialGeometry(size_px=750, extent_m=100.0)
    column, row = geometry.pixel_of(10.0, 20.0)
    assert (float(column), float(row)) == (375 + 75, 375 - 150)
    np.testing.assert_allclose(geometry.ground_of(column, row), (10.0, 20.0))


def test_the_local_plane_has_the_radii_of_the_wgs84_ellipsoid() -> None:
    plane = LocalPlane()
    semi_major_m, flattening = 6378137.0, 1 / 298.257223563
    squared = flattening * (2 - flattening)
    root = np.sqrt(1 - squared * np.sin(np.radians(plane.latitude_deg)) ** 2)
    meridian = semi_major_m * (1 - squared) / root**3
    normal = semi_major_m / root * np.cos(np.radians(plane.latitude_deg))
    np.testing.assert_allclose(plane.metres_per_degree, np.radians([meridian, normal]), rtol=1e-6)


def test_degrees_and_metres_of_the_plane_are_inverse() -> None:
    plane = LocalPlane()
    places = np.random.default_rng(2).uniform(-5000, 5000, (2, 100))
    np.testing.assert_allclose(plane.to_metres(*plane.to_degrees(*places)), places, atol=1e-6)
