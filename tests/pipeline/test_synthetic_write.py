"""The town on disk: CVUSA's layout, disjoint splits, the same bytes however it is made."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from cvft.errors import ConfigError, DataError
from pipeline.schema import TRAIN, VAL
from pipeline.synthetic.canvas import paint
from pipeline.synthetic.geometry import LocalPlane
from pipeline.synthetic.places import MIN_APART_M, REACH_M, Place, plan_places
from pipeline.synthetic.scene import Material
from pipeline.synthetic.town import scene_at
from pipeline.synthetic.write import TownConfig, render_pair, write_town

CONFIG = TownConfig(num_pairs=9, seed=3)
EXTENT_M = CONFIG.aerial.extent_m


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("town")
    write_town(out, config=CONFIG, workers=1)
    return out


@pytest.fixture(scope="module")
def places() -> list[Place]:
    return plan_places(0, num_train=900, num_val=300, extent_m=EXTENT_M)


def test_the_layout_is_cvusas(town: Path) -> None:
    train, val = (rows(town / "splits" / f"{split}-19zl.csv") for split in (TRAIN, VAL))
    assert (len(train), len(val)) == (7, 2)
    for aerial, ground, annotation in train + val:
        number = Path(aerial).stem
        assert [aerial, ground] == [f"bingmap/19/{number}.jpg", f"streetview/panos/{number}.jpg"]
        assert annotation == f"streetview/annotations/{number}.png"
        assert simplejpeg.decode_jpeg((town / aerial).read_bytes()).shape == (750, 750, 3)
        assert simplejpeg.decode_jpeg((town / ground).read_bytes()).shape == (224, 1232, 3)
    assert sorted(int(Path(row[0]).stem) for row in train + val) == list(range(1, 10))


def test_row_int_id_of_all_csv_is_where_the_pair_was_taken(town: Path) -> None:
    table = np.array(rows(town / "split_locations" / "all.csv"), dtype=float)
    plane = LocalPlane()
    asked, own = (np.stack(plane.to_metres(table[:, k], table[:, k + 1]), axis=1) for k in (0, 2))
    planned = {place.number: place for place in plan_places(3, num_train=7, num_val=2, extent_m=EXTENT_M)}
    expected = [(planned[number].east_m, planned[number].north_m) for number in range(1, 10)]
    np.testing.assert_allclose(own, expected, atol=0.01)
    off = np.hypot(*(asked - own).T)
    assert 1.0 <= off.min() <= off.max() <= 9.0
    ground, aerial = render_pair(CONFIG, planned[5])
    for folder, image in (("streetview/panos", ground), ("bingmap/19", aerial)):
        encoded = simplejpeg.encode_jpeg(image, quality=CONFIG.jpeg_quality, colorspace="RGB")
        assert (town / folder / "0000005.jpg").read_bytes() == encoded


def test_two_processes_write_the_bytes_that_one_writes(town: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    summary = write_town(tmp_path, config=CONFIG, workers=2, progress=lambda done, total: told.append((done, total)))
    assert files(tmp_path) == files(town)
    assert summary.num_pairs == {TRAIN: 7, VAL: 2}
    assert (told[0], told[-1]) == ((0, 9), (9, 9))


def test_a_stopped_town_is_continued_and_finished_images_are_kept(town: Path, tmp_path: Path) -> None:
    shutil.copytree(town, tmp_path, dirs_exist_ok=True)
    (tmp_path / "bingmap/19/0000007.jpg").unlink()
    (tmp_path / "split_locations/all.csv").unlink()
    (tmp_path / "streetview/panos/.0000007.jpg.partial").write_bytes(b"half a picture")
    kept = tmp_path / "bingmap/19/0000001.jpg"
    before = kept.stat().st_mtime_ns
    summary = write_town(tmp_path, config=CONFIG, workers=1)
    assert summary.num_written == 1
    assert kept.stat().st_mtime_ns == before
    assert files(tmp_path) == files(town)


def test_another_town_in_the_folder_is_refused(town: Path) -> None:
    before = files(town)
    with pytest.raises(DataError, match="another town"):
        write_town(town, config=replace(CONFIG, seed=4), workers=1)
    assert files(town) == before


def test_images_of_another_origin_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "bingmap").mkdir()
    with pytest.raises(DataError, match="no synthetic town"):
        write_town(tmp_path, config=CONFIG, workers=1)


@pytest.mark.parametrize("wrong", [{"num_pairs": 0}, {"val_fraction": 1.0}, {"seed": -1}])
def test_a_value_that_makes_no_town_is_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(CONFIG, **wrong)


def test_no_ground_that_a_train_image_shows_is_seen_from_val(places: list[Place]) -> None:
    east = {split: [place.east_m for place in places if place.split == split] for split in (TRAIN, VAL)}
    gap_m = min(east[VAL]) - max(east[TRAIN])
    assert gap_m > EXTENT_M  # no two aerial squares overlap
    assert gap_m > REACH_M + EXTENT_M / 2  # what a panorama sees is in no aerial of the other split
    assert gap_m > 2 * REACH_M  # no two panoramas see the same thing


def test_cameras_keep_their_distance_and_ids_are_complete(places: list[Place]) -> None:
    spots = np.array([(place.east_m, place.north_m) for place in places])
    apart = np.hypot(*(spots[:, None] - spots[None]).transpose(2, 0, 1))
    np.fill_diagonal(apart, np.inf)
    assert apart.min() >= MIN_APART_M
    assert sorted(place.number for place in places) == list(range(1, 1201))
    assert [sum(place.split == split for place in places) for split in (TRAIN, VAL)] == [900, 300]


def test_cameras_stand_on_streets(places: list[Place]) -> None:
    road = {Material.ASPHALT, Material.ASPHALT_OLD, Material.GRAVEL, Material.WHITE_LINE, Material.YELLOW_LINE}
    for place in places[::150]:
        canvas = paint(scene_at(0, (place.east_m, place.north_m), reach_m=20.0), size_px=100, px_per_m=5.0)
        assert Material(canvas.labels[50, 50]) in road


def test_two_neighbours_see_one_town(places: list[Place]) -> None:
    first = places[400]
    step_px, px_per_m = 90, 7.5
    canvases = []
    for shift in (0.0, step_px / px_per_m):
        center = (round(first.east_m) + shift, float(round(first.north_m)))
        canvases.append(paint(scene_at(0, center), size_px=1200, px_per_m=px_per_m))
    one, other = canvases[0].heights[:, step_px:], canvases[1].heights[:, :-step_px]
    inner = np.s_[150:-150, 150:-150]
    assert (np.abs(one[inner] - other[inner]) < 0.3).mean() > 0.995
    one, other = canvases[0].texture[:, step_px:], canvases[1].texture[:, :-step_px]
    assert (np.abs(one[inner] - other[inner]) < 0.02).mean() > 0.97


def test_places_look_different_from_each_other(places: list[Place]) -> None:
    config = TownConfig(num_pairs=1200)
    aerials = [
        cv2.resize(render_pair(config, place)[1], (24, 24), interpolation=cv2.INTER_AREA) for place in places[::240]
    ]
    flat = np.array([image.mean(axis=2).ravel() for image in aerials])
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.8
