"""Augmentation against rendered scenes: both views together stay a picture of one place, each alone does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvft.augment_pixels import turn_aerial, turn_panorama
from cvft.polar_transform import PolarTransform
from pipeline.synthetic.light import Day
from pipeline.synthetic.scene import Building, CarSlot, Line, Material, Patch, Scene, Street, rectangle
from pipeline.synthetic.town import scene_at
from tests.pipeline.test_synthetic_views import AERIAL, CENTER, PANORAMA, box, scene, shows, views

CHANGES = [(True, 0), (False, 1), (False, 2), (False, 3), (True, 1), (True, 3)]  # mirrored, quarter turns
PLACES = [
    (24.0, 14.0),
    (-14.0, 25.0),
    (26.0, -9.0),
    (-24.0, -12.0),
    (3.0, 28.0),
]  # of a tower; none on an axis of a mirror


@pytest.fixture(scope="module")
def towers() -> tuple[Tensor, Tensor]:
    """Return panoramas and aerial images of a red tower, one place each."""
    rendered = [views(scene(box(east, north, height=15.0))) for east, north in PLACES]
    panoramas, aerials = (torch.from_numpy(np.stack(view)) for view in zip(*rendered, strict=True))
    return panoramas, aerials


def _changed(pixels: Tensor, change: tuple[bool, int]) -> Tensor:
    mirrored, turns = torch.full((len(pixels),), change[0]), torch.full((len(pixels),), change[1])
    if pixels.shape[1] == pixels.shape[2]:
        return turn_aerial(pixels, is_mirrored=mirrored, quarter_turns=turns)
    return turn_panorama(pixels, is_mirrored=mirrored, quarter_turns=turns, shift_px=torch.zeros_like(turns))


def _bearings(panoramas: Tensor) -> NDArray[np.float64]:
    """Return the azimuth in degrees of what is red in each panorama: the mean of its pixels on the circle."""
    width = panoramas.shape[2]
    turns = [(np.nonzero(shows(image, 0))[1] + 0.5) / width - 0.5 for image in panoramas.numpy()]
    assert min(len(turn) for turn in turns) > 50
    return np.degrees([np.angle(np.exp(2j * np.pi * turn).mean()) for turn in turns])


def _aerial_bearings(aerials: Tensor) -> NDArray[np.float64]:
    """Return the azimuth in degrees of the middle of what is red in each aerial image."""
    places = [np.argwhere(shows(image, 0)).mean(axis=0) + 0.5 - AERIAL.size_px / 2 for image in aerials.numpy()]
    return np.degrees([np.arctan2(column, -row) for row, column in places])


def _off_px(bearing_deg: NDArray[np.float64], other_deg: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return by how many columns two bearings differ, signed and the short way round."""
    return ((bearing_deg - other_deg + 180) % 360 - 180) / PANORAMA.degrees_per_px


@pytest.mark.parametrize("change", CHANGES)
def test_a_tower_keeps_one_bearing_in_both_views_only_if_both_are_changed(
    towers: tuple[Tensor, Tensor], change: tuple[bool, int]
) -> None:
    panoramas, aerials = towers
    before = _off_px(_bearings(panoramas), _aerial_bearings(aerials))
    assert np.abs(before).max() < 4  # a near wall's middle pixel is not quite its tower's middle
    rolled, turned = _changed(panoramas, change), _changed(aerials, change)
    # To the column: what the renderer and the measurement leave before is left after, with its sign mirrored.
    together = _off_px(_bearings(rolled), _aerial_bearings(turned))
    np.testing.assert_allclose(together, -before if change[0] else before, atol=1e-6)
    for alone in (
        _off_px(_bearings(rolled), _aerial_bearings(aerials)),
        _off_px(_bearings(panoramas), _aerial_bearings(turned)),
    ):
        # A quarter turn is 308 columns; mirrored, a tower is off by twice its bearing from the axis.
        assert np.median(np.abs(alone)) > 150
        assert np.abs(alone).min() > 35


def _moved(made: Scene, change: tuple[bool, int]) -> Scene:
    """Return a scene mirrored east to west and then turned counter-clockwise about its camera."""
    mirrored, turns = change
    turn = np.pi / 2 * turns
    rotation = np.round([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = rotation @ np.diag([-1.0 if mirrored else 1.0, 1.0])

    def points(given: NDArray[np.float64]) -> NDArray[np.float64]:
        return (given - made.center) @ matrix.T + made.center

    def thing(given):  # type: ignore[no-untyped-def]
        east, north = points(np.array([[given.east_m, given.north_m]]))[0]
        moved = given._replace(east_m=float(east), north_m=float(north))
        if isinstance(given, Building | CarSlot):
            moved = moved._replace(angle=(np.pi - given.angle if mirrored else given.angle) + turn)
        return moved

    def line(given: Line) -> Line:
        return given._replace(points=points(given.points))

    def street(given: Street) -> Street:
        slots = tuple(thing(slot) for slot in given.slots)
        markings = tuple(line(marking) for marking in given.markings)
        return given._replace(points=points(given.points), slots=slots, markings=markings)

    return Scene(
        center=made.center,
        patches=[patch._replace(outline=points(patch.outline)) for patch in made.patches],
        waters=[line(water) for water in made.waters],
        streets=[street(road) for road in made.streets],
        lines=[line(stroke) for stroke in made.lines],
        buildings=[thing(house) for house in made.buildings],
        trees=[thing(tree) for tree in made.trees],
    )


@pytest.mark.parametrize("change", [(False, 1), (True, 0), (True, 3)])
def test_the_changed_views_of_a_piece_of_town_are_the_views_of_the_changed_town(change: tuple[bool, int]) -> None:
    made = scene_at(7, (310.0, -120.0))
    azimuth = 2.0
    moved_azimuth = (-azimuth if change[0] else azimuth) - np.pi / 2 * change[1]
    day = Day(haze_m=1e9, clouds=0.0, sun_azimuth_rad=azimuth)
    given = [torch.from_numpy(view)[None] for view in views(made, day)]
    truth = views(_moved(made, change), replace(day, sun_azimuth_rad=moved_azimuth))
    for name, before, expected in zip(("panorama", "aerial"), given, truth, strict=True):
        found = _changed(before, change)[0].numpy()
        off, off_before = (float(np.abs(image.astype(int) - expected).mean()) for image in (found, before[0].numpy()))
        # Grain of leaves and asphalt, the far horizon and the order of edges are drawn anew and stay different.
        assert off < 0.4 * off_before, (name, off, off_before)


def test_a_landmark_has_its_bearing_as_column_and_its_distance_as_row_in_the_unrolled_aerial_image(
    towers: tuple[Tensor, Tensor],
) -> None:
    panoramas, aerials = towers
    size_px = PANORAMA.height_px, PANORAMA.width_px
    unrolled = PolarTransform(size_px)(aerials.permute(0, 3, 1, 2).float()).permute(0, 2, 3, 1).round().byte()
    found = _bearings(unrolled)
    expected = np.degrees([np.arctan2(east, north) for east, north in PLACES])
    assert np.abs(_off_px(found, expected)).max() < 3
    assert np.abs(_off_px(found, _bearings(panoramas))).max() < 5
    for image, (east, north) in zip(unrolled.numpy(), PLACES, strict=True):
        rows = np.nonzero(shows(image, 0))[0] + 0.5
        distance_m = (1 - rows.mean() / size_px[0]) * AERIAL.extent_m / 2
        assert distance_m == pytest.approx(np.hypot(east, north), abs=0.5)


def test_ground_far_and_near_in_the_unrolled_image_stands_above_and_below() -> None:
    made = scene()
    for north in (8.0, 30.0):
        pool = rectangle((CENTER[0], CENTER[1] + north), half_length=3.0, half_depth=1.0, angle=0.0)
        made.patches.append(Patch(pool, Material.POOL))
    _, aerial = views(made)
    unrolled = PolarTransform((100, 400))(torch.from_numpy(aerial)[None].permute(0, 3, 1, 2).float())[0]
    rows = np.flatnonzero((unrolled[2] - unrolled[0])[:, 199:201].mean(1) > 40) + 0.5
    assert {round((1 - row / 100) * 50) for row in rows} <= {7, 8, 9, 29, 30, 31}
    assert rows.min() < 45
    assert rows.max() > 80
