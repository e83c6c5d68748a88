"""The town in CVACT's layout: MATLAB's shapes, the originals' sizes, val once more in the test half, the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
import simplejpeg
from PIL import Image

from cvft.errors import ConfigError
from pipeline.sources.base import count_kinds, count_splits
from pipeline.sources.detect import open_source
from pipeline.synthetic.lists import UTM_ORIGIN_M
from pipeline.synthetic.places import plan_places
from pipeline.synthetic.write import CvactConfig, TownConfig, cvact_town, write_town

CONFIG = cvact_town(num_pairs=4, seed=3, cvact=CvactConfig(num_test=2, num_without_files=1))


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("act")
    summary = write_town(out, config=CONFIG, workers=1)
    assert summary.num_pairs == {"train": 3, "val": 1, "test": 3}
    return out


def test_the_list_reads_as_the_fields_code_reads_it(town: Path) -> None:
    # The expressions are those of public loaders; the file is theirs to read, not ours.
    data = scipy.io.loadmat(town / "ACT_data.mat")
    ids = [f"ANU_data_small/streetview/{data['panoIds'][i]}_grdView.jpg" for i in range(len(data["panoIds"]))]
    train = data["trainSet"]["trainInd"][0][0] - 1
    assert train.shape == (4, 1)
    assert [(town / ids[train[k][0]]).exists() for k in range(4)] == [True, True, True, False]
    assert data["panoIds"][data["trainSet"][0][0][1] - 1].squeeze().shape == (4,)
    val, test = (set((data[name]["valInd"][0][0] - 1).ravel().tolist()) for name in ("valSet", "valSetAll"))
    assert val < test
    assert test.isdisjoint(train.ravel().tolist())
    assert len(data["panoIds"]) == len(data["utm"]) == len(test | set(train.ravel().tolist())) == 9


def test_images_have_the_originals_sizes_and_val_is_in_both_halves(town: Path) -> None:
    for half, num_pairs in (("small", 4), ("test", 3)):
        for folder, shape in (("streetview", (832, 1664, 3)), ("satview_polish", (1200, 1200, 3))):
            paths = list((town / f"ANU_data_{half}" / folder).iterdir())
            assert len(paths) == num_pairs
            assert {simplejpeg.decode_jpeg(path.read_bytes()).shape for path in paths} == {shape}
    small, test = files(town / "ANU_data_small"), files(town / "ANU_data_test")
    twins = small.keys() & test.keys()
    assert len(twins) == 2
    assert all(small[name] == test[name] for name in twins)


def test_middle_rows_hold_the_view_and_the_rest_is_sky_and_road(town: Path) -> None:
    path = next((town / "ANU_data_small/streetview").iterdir())
    rows = simplejpeg.decode_jpeg(path.read_bytes()).astype(float)
    detail = np.abs(np.diff(rows.mean(axis=2), axis=1)).mean(axis=1)  # [832]
    assert detail[208:624].mean() > 1.5 * max(detail[:150].mean(), detail[680:].mean())
    top, bottom = rows[:100].mean(axis=(0, 1)), rows[-100:].mean(axis=(0, 1))
    assert top.mean() > bottom.mean() + 30  # the sky is brighter than what is under the camera


def test_scan_finds_every_pair_at_its_place_and_names_the_ids_without_files(town: Path) -> None:
    scan = open_source(town)
    assert count_splits(scan.pairs) == {"train": 3, "val": 1, "test": 3}
    assert count_kinds(scan.problems) == {"missing_aerial": 4, "missing_ground": 4}
    planned = plan_places(3, num_train=3, num_val=1, num_test=2, extent_m=CONFIG.aerial.extent_m)
    expected = {(place.east_m, place.north_m) for place in planned}
    origin = np.array(UTM_ORIGIN_M)
    found = {tuple(np.array([pair.location.easting_m, pair.location.northing_m]) - origin) for pair in scan.pairs}
    np.testing.assert_allclose(sorted(found), sorted(expected), atol=1e-6)


def test_two_processes_write_the_bytes_that_one_writes_and_a_stopped_town_is_continued(town: Path, tmp_path: Path):
    write_town(tmp_path, config=CONFIG, workers=2)
    assert files(tmp_path) == files(town)
    twin = next((tmp_path / "ANU_data_test/streetview").iterdir())
    twin.unlink()
    (tmp_path / "ACT_data.mat").unlink()
    assert write_town(tmp_path, config=CONFIG, workers=1).num_written == 1
    assert files(tmp_path) == files(town)


def test_prepared_set_is_of_small_pngs(tmp_path: Path) -> None:
    config = cvact_town(num_pairs=1, cvact=CvactConfig(is_prepared=True))
    write_town(tmp_path, config=config, workers=1)
    scan = open_source(tmp_path)
    (pair,) = scan.pairs
    with Image.open(tmp_path / pair.ground) as ground, Image.open(tmp_path / pair.aerial) as aerial:
        assert (ground.format, ground.size, aerial.format, aerial.size) == ("PNG", (616, 112), "PNG", (256, 256))


def test_a_town_in_each_layout_shows_the_same_number_of_pairs(town: Path, tmp_path: Path) -> None:
    write_town(tmp_path, config=TownConfig(num_pairs=4, seed=3), workers=1)
    cvusa, cvact = open_source(tmp_path), open_source(town)
    assert (cvusa.layout, cvact.layout) == ("cvusa", "cvact")
    assert count_splits(cvusa.pairs) == {"train": 3, "val": 1}
    assert not cvusa.problems


def test_impossible_numbers_are_named() -> None:
    with pytest.raises(ConfigError, match=r"cvact\.num_test: -1"):
        CvactConfig(num_test=-1)
