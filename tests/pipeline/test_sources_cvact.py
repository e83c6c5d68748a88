"""CVACT as users have it: both halves, one half, mixed suffixes, lists that name more than there is, damaged lists."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
from scipy.io import savemat

from cvft.errors import DataError
from pipeline.checks import load_pair
from pipeline.raw import RawFolder
from pipeline.sources.base import SourceScan, count_kinds, count_splits
from pipeline.sources.detect import open_source
from pipeline.sources.matlab import read_act_data
from pipeline.validate import validate

IDS = [f"{letter * 20}-_" for letter in "abcdef"]
UTM_M = np.array([[692_000.0 + 10 * k, 6_092_000.0 - 7 * k] for k in range(6)])


def act_data(**changes: Any) -> dict[str, Any]:
    """Three ids of train, one of val, and of the test half that one and two others."""
    content = {
        "panoIds": np.array(IDS),
        "utm": UTM_M,
        "trainSet": {"n": 3, "trainInd": np.array([[1], [2], [3]], np.int32)},
        "valSet": {"n": 1, "valInd": np.array([[4]], np.uint16)},
        "valSetAll": {"n": 3, "valInd": np.array([[4], [5], [6]], np.float64)},
    }
    return {name: value for name, value in (content | changes).items() if value is not None}


def mat_bytes(content: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    savemat(stream, content)
    return stream.getvalue()


LIST = mat_bytes(act_data())


def write_half(folder: Path, ids: list[str], jpeg: bytes, *, suffix: str = ".jpg") -> None:
    for name, ending in (("streetview", "grdView"), ("satview_polish", "satView_polish")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for pano_id in ids:
            (folder / name / f"{pano_id}_{ending}{suffix}").write_bytes(jpeg)


def splits_of(scan: SourceScan) -> list[tuple[str, str]]:
    return [(pair.split, pair.location_id[:1]) for pair in scan.pairs]


ALL = [("train", "a"), ("train", "b"), ("train", "c"), ("val", "d"), ("test", "d"), ("test", "e"), ("test", "f")]


@pytest.fixture
def cvact(tmp_path, make_jpeg) -> Path:
    root = tmp_path / "raw"
    write_half(root / "ANU_data_small", IDS[:4], make_jpeg((24, 48), 0))
    write_half(root / "ANU_data_test", IDS[3:], make_jpeg((24, 48), 0))
    (root / "ACT_data.mat").write_bytes(LIST)
    return root


class TestLayout:
    @pytest.mark.parametrize("base", ["", "CVACT", "CVACT/dataset"])
    @pytest.mark.parametrize("place", ["", "ANU_data_small", "ANU_data_test", "CVACT_orientations"])
    def test_halves_and_list_are_found_where_users_have_them(self, base, place, cvact, tmp_path):
        moved = tmp_path / "user" / base
        moved.parent.mkdir(parents=True, exist_ok=True)
        cvact.rename(moved)
        (moved / place).mkdir(exist_ok=True)
        (moved / "ACT_data.mat").rename(moved / place / "ACT_data.mat")
        scan = open_source(tmp_path / "user")
        assert scan.layout == "cvact"
        assert splits_of(scan) == ALL
        assert not scan.problems

    def test_list_may_lie_above_the_layouts_folder(self, cvact, tmp_path):
        (tmp_path / "user").mkdir()
        cvact.rename(tmp_path / "user/CVACT")
        (tmp_path / "user/CVACT/ACT_data.mat").rename(tmp_path / "user/ACT_data.mat")
        assert splits_of(open_source(tmp_path / "user")) == ALL

    @pytest.mark.parametrize(("half", "expected"), [("ANU_data_small", ALL[:4]), ("ANU_data_test", ALL[4:])])
    def test_half_may_be_the_root_itself_with_the_list_beside_it(self, half, expected, cvact):
        assert splits_of(open_source(cvact / half)) == expected

    def test_streetview_may_have_a_prepared_sets_name(self, cvact):
        (cvact / "ANU_data_small/streetview").rename(cvact / "ANU_data_small/streetview_processed")
        assert open_source(cvact).pairs[0].ground == f"ANU_data_small/streetview_processed/{IDS[0]}_grdView.jpg"

    def test_keys_are_unique_and_twins_share_their_location_id(self, cvact):
        pairs = open_source(cvact).pairs
        assert len({pair.key for pair in pairs}) == 7
        assert [pair.key for pair in pairs if pair.location_id == IDS[3]] == [IDS[3], f"test-{IDS[3]}"]
        assert pairs[4].ground.startswith("ANU_data_test/")

    @pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg"])
    def test_suffixes_may_be_mixed(self, suffix, cvact):
        path = cvact / f"ANU_data_small/streetview/{IDS[1]}_grdView.jpg"
        path.rename(path.with_suffix(suffix))
        scan = open_source(cvact)
        assert not scan.problems
        assert scan.pairs[1].ground.endswith(f"{IDS[1]}_grdView{suffix}")

    def test_second_file_of_an_id_and_files_in_no_list_are_noted(self, cvact, make_jpeg):
        write_half(cvact / "ANU_data_small", [IDS[0]], make_jpeg((24, 48), 0), suffix=".png")
        write_half(cvact / "ANU_data_small", ["stranger"], make_jpeg((24, 48), 0))
        scan = open_source(cvact)
        assert splits_of(scan) == ALL
        assert count_kinds(scan.problems) == {"second_file": 2, "unlisted_file": 2}
        assert all(pair.ground.endswith(".jpg") for pair in scan.pairs)
        assert "unlisted_file" not in count_kinds(open_source(cvact, split="val").problems)

    def test_cell_array_of_strings_reads_as_the_character_matrix_does(self, cvact):
        before = open_source(cvact).pairs
        savemat(cvact / "ACT_data.mat", act_data(panoIds=np.array(IDS, dtype=object)[:, None]), do_compression=True)
        assert open_source(cvact).pairs == before


class TestSplits:
    def test_one_split_can_be_asked_for(self, cvact):
        assert splits_of(open_source(cvact, split="test")) == ALL[4:]
        with pytest.raises(DataError, match=r"no split 'tests'; it has train, val, test"):
            open_source(cvact, split="tests")

    @pytest.mark.parametrize(
        ("half", "expected", "absent"),
        [("ANU_data_test", ALL[:4], ["test (3 ids)"]), ("ANU_data_small", ALL[4:], ["train (3 ids)", "val (1 ids)"])],
    )
    def test_absent_half_is_told_and_the_other_is_usable(self, half, expected, absent, cvact):
        (cvact / half).rename(cvact / "elsewhere")
        report = validate(cvact)
        assert report.ok
        assert splits_of(open_source(cvact)) == expected
        told = [problem for problem in report.details if problem.kind == "absent_split"]
        assert [(problem.path, problem.is_unusable) for problem in told] == [(half, False)] * len(absent)
        assert all(name in problem.detail for name, problem in zip(absent, told, strict=True))

    def test_asking_for_a_split_of_the_absent_half_is_refused(self, cvact):
        (cvact / "ANU_data_test").rename(cvact / "elsewhere")
        with pytest.raises(DataError, match="split test needs ANU_data_test/, which is not there"):
            open_source(cvact, split="test")

    def test_list_without_one_split_is_usable_for_the_others(self, cvact):
        savemat(cvact / "ACT_data.mat", act_data(valSetAll=None))
        scan = open_source(cvact)
        assert splits_of(scan) == ALL[:4]
        assert count_kinds(scan.problems) == {"absent_split": 1, "unlisted_file": 6}
        with pytest.raises(DataError, match=r"split test needs valSetAll in ACT_data\.mat"):
            open_source(cvact, split="test")


class TestDirt:
    def test_ids_without_files_are_each_counted_named_and_explained(self, cvact):
        (cvact / f"ANU_data_small/streetview/{IDS[0]}_grdView.jpg").unlink()
        (cvact / f"ANU_data_small/satview_polish/{IDS[0]}_satView_polish.jpg").unlink()
        (cvact / f"ANU_data_test/satview_polish/{IDS[5]}_satView_polish.jpg").write_bytes(b"")
        scan = open_source(cvact)
        assert splits_of(scan) == ALL[1:6]
        assert [(problem.kind, problem.key, problem.is_unusable) for problem in scan.problems] == [
            ("missing_ground", IDS[0], True),
            ("missing_aerial", IDS[0], True),
            ("empty_file", f"test-{IDS[5]}", True),
        ]
        assert "ACT_data.mat:trainSet.trainInd:1, no such file; normal in CVACT" in scan.problems[0].detail

    @pytest.mark.parametrize("index", [0, 7, -1, 1.5, np.nan, np.inf, 1e300])
    def test_index_that_is_no_id_is_a_bad_row(self, index, cvact):
        savemat(cvact / "ACT_data.mat", act_data(valSet={"n": 2, "valInd": np.array([[4.0], [index]])}))
        scan = open_source(cvact)
        assert splits_of(scan) == ALL
        (problem,) = scan.problems
        assert (problem.kind, problem.path, problem.is_unusable) == ("bad_row", "ACT_data.mat:valSet.valInd:2", True)
        assert "is none of 1 to 6" in problem.detail

    def test_ids_listed_twice_are_told(self, cvact):
        train = {"n": 4, "trainInd": np.array([[1], [2], [3], [1]])}
        savemat(cvact / "ACT_data.mat", act_data(trainSet=train, valSet={"n": 1, "valInd": np.array([[4], [3]])}))
        scan = open_source(cvact)
        assert splits_of(scan) == ALL
        assert count_kinds(scan.problems) == {"duplicate_key": 1, "duplicate_row": 1}

    @pytest.mark.parametrize("position", [(0.0, 0.0), (np.nan, 1.0), (692_000.0, np.inf), (149.1, -35.3)])
    def test_impossible_position_is_no_location(self, position, cvact):
        utm_m = UTM_M.copy()
        utm_m[0] = position
        savemat(cvact / "ACT_data.mat", act_data(utm=utm_m))
        scan = open_source(cvact)
        assert splits_of(scan) == ALL
        assert [(problem.kind, problem.key) for problem in scan.problems] == [("no_location", IDS[0])]
        assert [pair.location is None for pair in scan.pairs] == [True] + [False] * 6

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"panoIds": None}, "has no panoIds"),
            ({"utm": None, "panoIds": None}, "has no panoIds and no utm"),
            ({"panoIds": np.arange(6)}, "panoIds is neither a character matrix nor a cell array"),
            ({"utm": UTM_M[:5]}, r"utm has the shape \[5, 2\], expected \[6, 2\]"),
            ({"utm": np.array(["a", "b"])}, "utm does not hold numbers"),
            ({"trainSet": {"n": 3}}, r"has no trainSet\.trainInd"),
            ({"trainSet": np.arange(3)}, r"has no trainSet\.trainInd"),
            ({"valSet": {"n": 1, "valInd": "abc"}}, r"valSet\.valInd does not hold numbers"),
        ],
    )
    def test_list_without_what_it_must_have_is_one_line(self, changes, told, cvact):
        savemat(cvact / "ACT_data.mat", act_data(**changes))
        with pytest.raises(DataError, match=rf"ACT_data\.mat: {told}") as caught:
            open_source(cvact)
        assert "\n" not in str(caught.value)

    def test_missing_list_is_told(self, cvact):
        (cvact / "ACT_data.mat").unlink()
        with pytest.raises(DataError, match=r"ACT_data\.mat is missing; it comes with CVACT"):
            open_source(cvact)

    def test_list_without_images_is_told(self, tmp_path):
        (tmp_path / "ACT_data.mat").write_bytes(LIST)
        with pytest.raises(DataError, match="but neither ANU_data_small/satview_polish nor"):
            open_source(tmp_path)

    def test_matlab_7_3_is_told_how_to_be_saved(self):
        header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
        with pytest.raises(DataError, match="save it again in MATLAB"):
            read_act_data(header + bytes(500), name="ACT_data.mat")

    def test_damage_anywhere_is_one_line_or_harmless(self):
        told = []
        damaged = [LIST[:length] for length in range(0, len(LIST), 500)]
        damaged += [LIST[:k] + bytes([LIST[k] ^ 0x55]) + LIST[k + 1 :] for k in range(0, len(LIST), 300)]
        for data in damaged:
            try:
                read_act_data(data, name="ACT_data.mat")
            except DataError as error:
                told.append(str(error))
        assert len(told) > len(damaged) / 3
        assert not any("\n" in message for message in told)

    def test_damage_that_crashes_the_reader_takes_nobody_along(self):
        crashing = bytearray(LIST)
        crashing[184] ^= 0x55  # the length of a name: SciPy 1.17's compiled reader ends with a segmentation fault
        with pytest.raises(DataError, match=r"ACT_data\.mat: is damaged"):
            read_act_data(bytes(crashing), name="ACT_data.mat")


class TestGeography:
    def test_utm_stays_as_it_is_and_degrees_are_those_of_zone_55_south(self, cvact):
        places = [pair.location for pair in open_source(cvact).pairs[:4]]
        np.testing.assert_array_equal([(place.easting_m, place.northing_m) for place in places], UTM_M[:4])
        # An independent way: the projection written out instead of its number in the register.
        zone = pyproj.Proj(proj="utm", zone=55, south=True, ellps="WGS84")
        longitude, latitude = zone(*UTM_M[:4].T, inverse=True)
        np.testing.assert_allclose([place.latitude_deg for place in places], latitude, atol=1e-9)
        np.testing.assert_allclose([place.longitude_deg for place in places], longitude, atol=1e-9)
        assert (latitude.round(), longitude.round()) == (pytest.approx(-35), pytest.approx(149))
        assert all(place.heading_deg is None for place in places)


class TestImages:
    @pytest.mark.parametrize(
        ("size_px", "rows_px"), [((832, 1664), (208, 624)), ((112, 616), None), ((416, 1664), None)]
    )
    def test_rows_are_cut_from_originals_alone(self, size_px, rows_px, cvact, make_jpeg):
        path = f"ANU_data_small/streetview/{IDS[0]}_grdView.jpg"
        (cvact / path).write_bytes(make_jpeg(size_px, 0))
        scan = open_source(cvact)
        images, _ = load_pair(scan.pairs[0], RawFolder.from_uri(cvact), rules=scan.rules, check_images=False)
        assert images["ground"].rows_px == rows_px
        assert images["aerial"].rows_px is None

    def test_manifest_holds_the_used_rows_and_the_utm_position(self, cvact, tmp_path, make_jpeg, make_shards):
        path = f"ANU_data_small/streetview/{IDS[3]}_grdView.jpg"
        (cvact / path).write_bytes(make_jpeg((832, 1664), 0))
        manifest = make_shards(cvact, str(tmp_path / "store"))
        (row,) = manifest.split("val").to_pylist()
        assert (row["ground_first_row_px"], row["ground_stop_row_px"]) == (208, 624)
        assert (row["easting_m"], row["northing_m"]) == tuple(UTM_M[3])
        assert manifest.split("test")["ground_first_row_px"].null_count == 3
        np.testing.assert_array_equal(manifest.location_m("val")[:, :2], UTM_M[3:4])

    def test_originals_and_prepared_sizes_are_usual(self, cvact, make_jpeg):
        write_half(cvact / "ANU_data_small", IDS[:4], make_jpeg((112, 616), 0))
        for pano_id in IDS[:4]:
            aerial = cvact / f"ANU_data_small/satview_polish/{pano_id}_satView_polish.jpg"
            aerial.write_bytes(make_jpeg((256, 256), 0))
        scan = open_source(cvact, split="train")
        for pair in scan.pairs:
            assert not load_pair(pair, scan.root, rules=scan.rules, check_images=True)[1]


def test_splits_of_a_whole_dataset_are_counted(cvact):
    assert count_splits(open_source(cvact).pairs) == {"test": 3, "train": 3, "val": 1}
