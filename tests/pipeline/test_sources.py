"""Each layout that users have is found, and each kind of dirt is counted and named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cvft.errors import DataError
from pipeline.schema import Location
from pipeline.sources.base import MAX_KEY_BYTES, count_kinds, count_splits, key_trouble
from pipeline.sources.cvusa import LOCATION_LISTS
from pipeline.sources.detect import open_source


def table_rows(jpeg: bytes, folder: Path, keys: list[str]) -> list[dict[str, str]]:
    rows = []
    for key in keys:
        for role in ("ground", "aerial"):
            (folder / f"{key}_{role}.jpg").write_bytes(jpeg)
        rows.append({"key": key, "ground": f"{key}_ground.jpg", "aerial": f"{key}_aerial.jpg"})
    return rows


class TestCvusa:
    @pytest.mark.parametrize(
        "base", ["", "CVUSA", "CVUSA/dataset", "CVPR_subset", "data/CVUSA/CVPR_subset", "CVUSA/CVUSA"]
    )
    @pytest.mark.parametrize("locations", LOCATION_LISTS)
    def test_every_known_layout_is_found_with_its_locations(self, base, locations, cvusa, tmp_path):
        moved = tmp_path / "user" / base
        shutil.copytree(cvusa, moved)
        target = moved / locations
        target.parent.mkdir(parents=True, exist_ok=True)
        (moved / "split_locations/all.csv").rename(target)
        scan = open_source(tmp_path / "user")
        assert scan.layout == "cvusa"
        assert count_splits(scan.pairs) == {"train": 11, "val": 5}
        assert not scan.problems

    def test_all_csv_above_the_split_lists_is_found(self, cvusa, tmp_path):
        shutil.copytree(cvusa, tmp_path / "user/CVPR_subset")
        shutil.move(tmp_path / "user/CVPR_subset/split_locations/all.csv", tmp_path / "user/all.csv")
        assert not open_source(tmp_path / "user").problems

    def test_location_is_the_panoramas_own_in_row_int_of_id_counted_from_one(self, cvusa):
        pair = open_source(cvusa).pairs[2]
        assert pair.key == "0000003"
        assert pair.location == Location(latitude_deg=60.2002, longitude_deg=24.9004, heading_deg=2.5)
        assert pair.ground == "streetview/panos/0000003.jpg"
        assert pair.aerial == "bingmap/19/0000003.jpg"

    def test_missing_location_file_is_a_counted_problem_of_usable_pairs(self, cvusa):
        (cvusa / "split_locations/all.csv").unlink()
        scan = open_source(cvusa)
        assert len(scan.pairs) == 16
        assert count_kinds(scan.problems) == {"no_location": 16}
        assert all(pair.location is None for pair in scan.pairs)

    def test_id_without_a_row_has_no_location(self, cvusa):
        rows = (cvusa / "split_locations/all.csv").read_text().splitlines()
        (cvusa / "split_locations/all.csv").write_text("\n".join(rows[:15]))
        (problem,) = open_source(cvusa).problems
        assert (problem.kind, problem.key) == ("no_location", "0000016")
        assert "which has 15" in problem.detail

    def test_crlf_blank_lines_byte_order_mark_and_headers_are_harmless(self, cvusa):
        for name, header in (
            ("splits/train-19zl.csv", "aerial,ground,annotation"),
            ("split_locations/all.csv", "lat,lon,pano_lat,pano_lon,heading"),
        ):
            lines = (cvusa / name).read_text().splitlines()
            (cvusa / name).write_bytes("\r\n".join(["\ufeff" + header, *lines, "", ""]).encode())
        scan = open_source(cvusa)
        assert len(scan.pairs) == 16
        assert not scan.problems
        assert scan.pairs[0].location == Location(latitude_deg=60.2, longitude_deg=24.9, heading_deg=0.5)

    def test_missing_and_empty_files_keep_a_pair_out_and_are_named(self, cvusa):
        (cvusa / "streetview/panos/0000001.jpg").unlink()
        (cvusa / "bingmap/19/0000002.jpg").unlink()
        (cvusa / "bingmap/19/0000003.jpg").write_bytes(b"")
        scan = open_source(cvusa)
        assert {pair.key for pair in scan.pairs}.isdisjoint({"0000001", "0000002", "0000003"})
        assert [(problem.kind, problem.key, problem.path) for problem in scan.problems] == [
            ("missing_ground", "0000001", "streetview/panos/0000001.jpg"),
            ("missing_aerial", "0000002", "bingmap/19/0000002.jpg"),
            ("empty_file", "0000003", "bingmap/19/0000003.jpg"),
        ]

    def test_folder_in_an_images_place_is_a_missing_image(self, cvusa):
        (cvusa / "streetview/panos/0000001.jpg").unlink()
        (cvusa / "streetview/panos/0000001.jpg").mkdir()
        (problem,) = open_source(cvusa).problems
        assert (problem.kind, problem.key) == ("missing_ground", "0000001")

    def test_repeated_row_is_noted_and_an_id_in_two_splits_is_unusable(self, cvusa):
        train = (cvusa / "splits/train-19zl.csv").read_text().splitlines()
        with (cvusa / "splits/train-19zl.csv").open("a") as stream:
            stream.write(train[0] + "\n")
        with (cvusa / "splits/val-19zl.csv").open("a") as stream:
            stream.write(train[1] + "\n")
        scan = open_source(cvusa)
        assert len(scan.pairs) == 16
        assert [(p.kind, p.key, p.path, p.is_unusable) for p in scan.problems] == [
            ("duplicate_row", "0000001", "train-19zl.csv:12", False),
            ("duplicate_key", "0000002", "val-19zl.csv:6", True),
        ]

    def test_row_of_one_column_is_a_bad_row(self, cvusa):
        with (cvusa / "splits/val-19zl.csv").open("a") as stream:
            stream.write("bingmap/19/0000001.jpg\n")
        (problem,) = open_source(cvusa).problems
        assert (problem.kind, problem.path) == ("bad_row", "val-19zl.csv:6")


class TestTable:
    def test_csv_gives_locations_and_splits(self, tmp_path, make_jpeg, make_table):
        rows = table_rows(make_jpeg((20, 30), 0), tmp_path, ["a", "b"])
        rows[0] |= {"latitude": "60.5", "longitude": "24.5", "heading_deg": "12", "split": "train"}
        rows[1] |= {"latitude": "-1", "longitude": "2", "heading_deg": "", "split": "test"}
        table = make_table(tmp_path / "pairs.csv", rows)
        by_folder, by_file = open_source(tmp_path), open_source(table)
        assert by_folder == by_file
        assert not by_folder.problems
        assert [(pair.key, pair.split, pair.location) for pair in by_folder.pairs] == [
            ("a", "train", Location(latitude_deg=60.5, longitude_deg=24.5, heading_deg=12.0)),
            ("b", "test", Location(latitude_deg=-1.0, longitude_deg=2.0)),
        ]

    def test_parquet_equals_csv(self, tmp_path, make_jpeg, make_table):
        rows = table_rows(make_jpeg((20, 30), 0), tmp_path, ["1", "2"])
        rows = [row | {"latitude": "60.25", "longitude": "24.5"} for row in rows]
        table = make_table(tmp_path / "list.csv", rows)
        typed = [row | {"key": int(row["key"]), "latitude": 60.25, "longitude": 24.5} for row in rows]
        pq.write_table(pa.Table.from_pylist(typed), tmp_path / "pairs.parquet")
        assert open_source(tmp_path).pairs == open_source(table).pairs

    def test_column_given_twice_is_refused(self, tmp_path):
        (tmp_path / "pairs.csv").write_text("key,ground,ground,aerial\n1,a.jpg,b.jpg,c.jpg\n")
        with pytest.raises(DataError, match="column ground more than once"):
            open_source(tmp_path)

    def test_without_a_split_column_pairs_are_val_unless_told(self, tmp_path, make_jpeg, make_table):
        make_table(tmp_path / "pairs.csv", table_rows(make_jpeg((20, 30), 0), tmp_path, ["a"]))
        assert count_splits(open_source(tmp_path).pairs) == {"val": 1}
        assert count_splits(open_source(tmp_path, split="train").pairs) == {"train": 1}

    def test_split_column_and_split_argument_contradict(self, tmp_path, make_jpeg, make_table):
        rows = [row | {"split": "train"} for row in table_rows(make_jpeg((20, 30), 0), tmp_path, ["a"])]
        make_table(tmp_path / "pairs.csv", rows)
        with pytest.raises(DataError, match="has a split column"):
            open_source(tmp_path, split="val")

    def test_misspelt_column_is_noted_with_the_near_one(self, tmp_path, make_jpeg, make_table):
        rows = [
            row | {"lattitude": "1", "longitude": "2"} for row in table_rows(make_jpeg((20, 30), 0), tmp_path, ["a"])
        ]
        make_table(tmp_path / "pairs.csv", rows)
        scan = open_source(tmp_path)
        assert count_kinds(scan.problems) == {"no_location": 1, "unknown_column": 1}
        assert "did you mean latitude?" in scan.problems[0].detail

    @pytest.mark.parametrize(
        ("latitude", "longitude", "heading"),
        [("north", "1", ""), ("91", "1", ""), ("nan", "1", ""), ("1", "", ""), ("1", "2", "inf"), ("1", "2", "east")],
    )
    def test_impossible_location_is_noted(self, latitude, longitude, heading, tmp_path, make_jpeg, make_table):
        place = {"latitude": latitude, "longitude": longitude, "heading_deg": heading}
        rows = [row | place for row in table_rows(make_jpeg((20, 30), 0), tmp_path, ["a"])]
        make_table(tmp_path / "pairs.csv", rows)
        scan = open_source(tmp_path)
        assert [pair.location for pair in scan.pairs] == [None]
        assert count_kinds(scan.problems) == {"no_location": 1}

    def test_missing_column_is_refused(self, tmp_path):
        (tmp_path / "pairs.csv").write_text("key,ground\na,b\n")
        with pytest.raises(DataError, match="no column aerial"):
            open_source(tmp_path)

    def test_damaged_parquet_is_refused(self, tmp_path):
        (tmp_path / "pairs.parquet").write_bytes(b"PAR1 and nothing more")
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            open_source(tmp_path)

    def test_file_names_that_are_not_utf8_are_read_and_noted(self, tmp_path, make_jpeg):
        name = b"caf\xe9.jpg"
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as stream:
            stream.write(make_jpeg((20, 30), 0))
        (tmp_path / "pairs.csv").write_bytes(
            b"key,ground,aerial,latitude,longitude\na," + name + b"," + name + b",1,2\n"
        )
        scan = open_source(tmp_path)
        assert len(scan.pairs) == 1
        assert scan.root.read_bytes(scan.pairs[0].ground) == make_jpeg((20, 30), 0)
        assert [(p.kind, p.path) for p in scan.problems] == [("non_utf8_name", "caf\\xe9.jpg")] * 2

    @pytest.mark.parametrize("split", ["../../evil/x", "a b", "val.1"])
    def test_split_that_cannot_name_a_shard_is_a_bad_row(self, split, tmp_path, make_jpeg, make_table):
        (row,) = table_rows(make_jpeg((20, 30), 0), tmp_path, ["a"])
        make_table(tmp_path / "pairs.csv", [row | {"split": split}])
        scan = open_source(tmp_path)
        (problem,) = scan.problems
        assert not scan.pairs
        assert (problem.kind, problem.key, problem.is_unusable) == ("bad_row", "a", True)
        assert f"split {split!r} is empty or has a dot, a slash or white space" in problem.detail

    def test_row_without_a_value_is_a_bad_row(self, tmp_path):
        (tmp_path / "pairs.csv").write_text("key,ground,aerial\na,,b.jpg\n")
        (problem,) = open_source(tmp_path).problems
        assert (problem.kind, problem.key, problem.path, problem.detail) == ("bad_row", "a", "pairs.csv:2", "no ground")


@pytest.mark.parametrize(
    "key", ["", "#a", "a.b", "a/b", "a b", "x" * (MAX_KEY_BYTES + 1), "ä" * MAX_KEY_BYTES, "caf\udce9"]
)
def test_key_that_cannot_name_tar_members_is_refused(key):
    assert key_trouble(key)


def test_longest_key_is_accepted():
    assert not key_trouble("x" * MAX_KEY_BYTES)


class TestDetect:
    def test_unknown_layout_says_what_was_looked_for_and_found(self, tmp_path):
        (tmp_path / "photos").mkdir()
        with pytest.raises(DataError, match=r"splits/\*-19zl\.csv.*pairs\.csv or pairs\.parquet.*found: photos"):
            open_source(tmp_path)

    def test_archive_that_is_still_packed_is_told(self, tmp_path):
        (tmp_path / "CVUSA.zip").touch()
        with pytest.raises(DataError, match=r"no known layout \(but CVUSA\.zip: unpack it first\)"):
            open_source(tmp_path)

    def test_missing_folder_is_named(self, tmp_path):
        with pytest.raises(DataError, match="no such folder"):
            open_source(tmp_path / "nowhere")

    def test_wrong_layout_name_lists_the_known_ones(self, tmp_path):
        with pytest.raises(DataError, match="use auto, cvusa, cvact, vigor, table"):
            open_source(tmp_path, layout="kitti")

    def test_folder_of_two_layouts_has_to_be_told(self, cvusa):
        (cvusa / "pairs.csv").write_text("key,ground,aerial\n")
        with pytest.raises(DataError, match="looks like cvusa and table; say which with --layout"):
            open_source(cvusa)
        assert open_source(cvusa, layout="cvusa").layout == "cvusa"

    @pytest.mark.parametrize(
        ("there", "near_miss"),
        [
            ("splits/train.csv", r"cvusa: .*\(splits/ is there but has no \*-19zl\.csv \(it has train\.csv\)\)"),
            ("CVUSA/bingmap/19/x.jpg", r"\(CVUSA/bingmap/ is there but no splits/\*-19zl\.csv beside it\)"),
            ("train-19zl.csv", "name the folder above as the root"),
            ("ANU_data_small/x", r"cvact: .*\(ANU_data_small/ is there but has no satview_polish/"),
            ("mine.csv", r"table: .*\(mine\.csv is there; if it is a table of pairs, name it as the root\)"),
        ],
    )
    def test_nearest_miss_of_each_layout_is_told(self, there, near_miss, tmp_path):
        (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / there).touch()
        with pytest.raises(DataError, match=near_miss) as caught:
            open_source(tmp_path)
        assert "\n" not in str(caught.value)
