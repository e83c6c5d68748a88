"""Scenes made by hand: what stands where must be where both views show it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.synthetic.aerial import render_aerial
from pipeline.synthetic.canvas import FIRST_BUILDING, paint
from pipeline.synthetic.geometry import AerialGeometry, PanoramaGeometry
from pipeline.synthetic.light import Day
from pipeline.synthetic.panorama import render_panorama
from pipeline.synthetic.rays import rays_of
from pipeline.synthetic.scene import Building, Material, Patch, Rgb, Scene, Tree, rectangle

RED, BLUE = (210, 30, 30), (30, 40, 210)
AERIAL, PANORAMA = AerialGeometry(), PanoramaGeometry()
PX_PER_M, SIZE_PX = AERIAL.px_per_m, 1200
CENTER = (1234.5, -678.25)
DAY = Day(haze_m=1e9, clouds=0.0, sun_azimuth_rad=np.pi, season="summer")
Image = NDArray[np.uint8]


def box(
    east: float, north: float, *, height: float, colour: Rgb = RED, half: tuple[float, float] = (2.0, 2.0)
) -> Building:
    return Building(CENTER[0] + east, CENTER[1] + north, *half, 0.0, height, 0.0, colour, colour, 0.0, 3.0, False)


def scene(*buildings: Building) -> Scene:
    ground = rectangle(CENTER, half_length=200, half_depth=200, angle=0.0)
    return Scene(center=CENTER, patches=[Patch(ground, Material.PLAZA)], buildings=list(buildings))


def views(made: Scene, day: Day = DAY) -> tuple[Image, Image]:
    canvas = paint(made, size_px=SIZE_PX, px_per_m=PX_PER_M)
    random = np.random.default_rng(0)
    panorama = render_panorama(made, canvas, day=day, geometry=PANORAMA, random=random)
    return panorama, render_aerial(made, canvas, day=day, geometry=AERIAL)


def shows(image: Image, channel: int) -> NDArray[np.bool_]:
    others = [image[..., c].astype(int) for c in range(3) if c != channel]
    return image[..., channel] > 1.6 * np.maximum(*others) + 8


def test_a_red_tower_in_the_north_east_is_at_45_degrees_and_up_right() -> None:
    panorama, aerial = views(scene(box(20.0, 20.0, height=15.0)))
    columns = np.nonzero(shows(panorama, 0))[1]
    azimuth_deg, _ = PANORAMA.direction_of(columns + 0.5, 0.0)
    assert len(columns) > 500
    assert azimuth_deg.mean() == pytest.approx(45.0, abs=0.5)
    rows, columns = np.nonzero(shows(aerial, 0))
    column, row = AERIAL.pixel_of(20.0, 20.0)
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((float(column), float(row)), abs=1.0)


def test_water_in_the_south_is_at_both_edges_of_the_panorama_and_at_the_bottom_of_the_aerial() -> None:
    made = scene()
    lake = rectangle((CENTER[0], CENTER[1] - 30), half_length=60, half_depth=15, angle=0.0)
    made.patches.append(Patch(lake, Material.POOL))
    panorama, aerial = views(made)
    _, row = (int(value) for value in PANORAMA.pixel_of_point(0.0, -20.0, 0.0))
    blueness = panorama[row, :, 2].astype(int) - panorama[row, :, 0]
    assert blueness[[0, 1, 50, -50, -2, -1]].min() > 40
    assert blueness[300:900].max() < 10
    assert (aerial[500:700, :, 2].astype(int) - aerial[500:700, :, 0]).min() > 40
    assert (aerial[:400, :, 2].astype(int) - aerial[:400, :, 0]).max() < 10


@pytest.mark.parametrize(("height", "is_hidden"), [(14.0, True), (2.0, False)])
def test_only_a_building_that_is_tall_enough_hides_what_is_behind(height: float, is_hidden: bool) -> None:
    behind = box(0.0, 30.0, height=6.0)
    panorama, _ = views(scene(behind, box(0.0, 15.0, height=height, colour=BLUE, half=(4.0, 2.0))))
    assert shows(panorama, 2).sum() > 500
    assert (shows(panorama, 0).sum() == 0) == is_hidden


@pytest.mark.parametrize("distance_m", [7.0, 12.0, 25.0, 45.0])
def test_the_base_of_a_wall_lies_at_the_angle_of_its_distance_in_the_aerial(distance_m: float) -> None:
    panorama, aerial = views(scene(box(0.0, distance_m + 2.0, height=5.0)))
    rows = np.flatnonzero(shows(panorama, 0)[:, 616])
    _, base = PANORAMA.pixel_of_point(0.0, distance_m, 0.0)
    _, top = PANORAMA.pixel_of_point(0.0, distance_m, 5.0)
    assert rows[-1] + 1 == pytest.approx(float(base), abs=1.5)
    assert rows[0] == pytest.approx(float(top), abs=1.5)
    near_edge = np.flatnonzero(shows(aerial, 0)[:, 375])[-1] + 1
    _, north = AERIAL.ground_of(375, near_edge)
    assert float(north) == pytest.approx(distance_m, abs=0.3)


def test_ground_at_a_pixel_of_the_panorama_is_the_ground_at_its_place_in_the_aerial() -> None:
    made = scene()
    for k, (east, north) in enumerate([(6.0, 3.0), (-8.0, 5.0), (4.0, -12.0), (-9.0, -9.0)]):
        made.patches.append(
            Patch(
                rectangle((CENTER[0] + east, CENTER[1] + north), half_length=1.2, half_depth=1.2, angle=0.3 * k),
                Material.POOL,
            )
        )
    panorama, aerial = views(made)
    rows, columns = np.nonzero(panorama[..., 2].astype(int) - panorama[..., 0] > 40)
    below = rows > 122
    azimuth_deg, elevation_deg = PANORAMA.direction_of(columns[below] + 0.5, rows[below] + 0.5)
    distance = PANORAMA.camera_height_m / np.tan(np.radians(-elevation_deg))
    turn = np.radians(azimuth_deg)
    column, row = AERIAL.pixel_of(distance * np.sin(turn), distance * np.cos(turn))
    seen = aerial[row.astype(int), column.astype(int)].astype(int)
    assert len(seen) > 1000
    assert (seen[:, 2] - seen[:, 0] > 40).mean() > 0.93


def test_rays_meet_boxes_where_the_slab_method_says() -> None:
    random = np.random.default_rng(5)
    places = random.uniform(5, 45, (14, 2)) * random.choice([-1, 1], (14, 2))
    boxes = [box(e, n, height=random.uniform(1, 20), half=tuple(random.uniform(1, 5, 2))) for e, n in places]
    canvas = paint(scene(*boxes), size_px=SIZE_PX, px_per_m=PX_PER_M)
    canvas.heights[canvas.labels < FIRST_BUILDING] = 0.0  # without the units on flat roofs
    for house in boxes:
        canvas.fill(
            rectangle(
                (house.east_m, house.north_m), half_length=house.half_length_m, half_depth=house.half_depth_m, angle=0.0
            ),
            50,
            height_m=house.eaves_m,
        )
    rays = rays_of(PANORAMA, size=SIZE_PX, px_per_m=PX_PER_M)
    hits = rays.cast(canvas.heights)
    expected = _first_hits(boxes)
    expected[expected > rays.reach_m] = np.inf
    found = np.where(hits.sample < 0, np.inf, rays.radii[hits.sample])
    both = np.isfinite(expected) & np.isfinite(found)
    assert (np.isfinite(expected) == np.isfinite(found)).mean() > 0.985
    error = np.abs(found[both] / expected[both] - 1)
    assert np.median(error) < 0.012
    assert (error < 0.04).mean() > 0.96


def _first_hits(boxes: list[Building]) -> NDArray[np.float64]:
    """Return each pixel's horizontal distance to the first box or the ground, from the planes themselves, [H, W]."""
    columns, rows = np.meshgrid(np.arange(PANORAMA.width_px) + 0.5, np.arange(PANORAMA.height_px) + 0.5)
    azimuth_deg, elevation_deg = PANORAMA.direction_of(columns, rows)
    direction = np.stack([np.sin(np.radians(azimuth_deg)), np.cos(np.radians(azimuth_deg))])
    slope, camera_m = np.tan(np.radians(elevation_deg)), PANORAMA.camera_height_m
    nearest = np.where(slope < 0, camera_m / -slope, np.inf)
    for house in boxes:
        middle = np.array([house.east_m - CENTER[0], house.north_m - CENTER[1]])[:, None, None]
        half = np.array([house.half_length_m, house.half_depth_m])[:, None, None]
        planes = np.sort(np.stack([(middle - half) / direction, (middle + half) / direction]), axis=0)
        enter, leave = planes[0].max(axis=0), planes[1].min(axis=0)
        up = camera_m + enter * slope
        roof = (house.eaves_m - camera_m) / slope
        is_wall = (up >= 0) & (up <= house.eaves_m)
        meets_roof = (up > house.eaves_m) & (slope < 0) & (roof <= leave)
        meets = (enter < leave) & (enter > 0) & (is_wall | meets_roof)
        nearest = np.where(meets, np.minimum(nearest, np.where(is_wall, enter, roof)), nearest)
    return nearest


def test_a_shadow_falls_away_from_the_sun_as_long_as_the_tower_over_the_tangent() -> None:
    height, elevation = 12.0, np.radians(40.0)
    day = replace(DAY, sun_azimuth_rad=np.pi, sun_elevation_rad=elevation)
    _, aerial = views(scene(box(0.0, 0.0, height=height)), day)
    bright = aerial[..., 1].astype(int)
    rows = np.flatnonzero(bright[:, 375] < 0.7 * np.median(bright))
    shadow = rows[rows < AERIAL.pixel_of(0.0, 2.5)[1]]
    _, tip = AERIAL.ground_of(375, shadow.min())
    assert float(tip) - 2.0 == pytest.approx(height / np.tan(elevation), rel=0.08)
    assert (rows > AERIAL.pixel_of(0.0, -2.5)[1]).sum() == 0


def test_a_tree_stands_at_its_azimuth_and_is_hidden_by_a_wall() -> None:
    tree = Tree(CENTER[0] + 20.0, CENTER[1] - 20.0, 2.5, 7.0, False, 0.4)
    bare, planted = scene(), scene()
    planted.trees.append(tree)
    low, high = replace(DAY, sun=0.0), views(bare, replace(DAY, sun=0.0))[0].astype(int)
    columns = np.nonzero(np.abs(views(planted, low)[0].astype(int) - high).max(axis=2) > 12)[1]
    assert PANORAMA.direction_of(columns + 0.5, 0.0)[0].mean() == pytest.approx(135.0, abs=1.0)
    wall = box(14.0, -14.0, height=25.0, half=(8.0, 8.0))
    walled, both = scene(wall), scene(wall)
    both.trees.append(tree)
    np.testing.assert_array_equal(views(walled, low)[0], views(both, low)[0])


def test_both_views_of_a_fixed_scene_are_what_they_were() -> None:
    panorama, aerial = views(scene(box(20.0, 20.0, height=15.0), box(-15.0, 5.0, height=5.0, colour=BLUE)))
    quarters = [panorama[:112, :616], panorama[:112, 616:], panorama[112:, :616], panorama[112:, 616:]]
    quarters += [aerial[:375, :375], aerial[:375, 375:], aerial[375:, :375], aerial[375:, 375:]]
    found = [quarter.mean(axis=(0, 1)) for quarter in quarters]
    np.testing.assert_allclose(found, EXPECTED, atol=1.0)


EXPECTED = [  # mean colours of the quarters of both views
    [128.9, 159.4, 201.9],
    [133.8, 157.6, 196.5],
    [174.8, 167.3, 157.5],
    [179.3, 170.3, 157.8],
    [185.3, 176.2, 166.1],
    [184.4, 174.0, 162.7],
    [186.8, 177.5, 166.0],
    [185.4, 176.3, 164.8],
]
