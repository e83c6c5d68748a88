"""VIGOR as users have it: cities, label files with positives and semi-positives, two protocols."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvft.errors import DataError
from pipeline.schema import Location
from pipeline.sources.base import SourceScan, count_kinds, count_splits
from pipeline.sources.detect import open_source
from pipeline.validate import validate

CITIES = ("Chicago", "NewYork", "SanFrancisco", "Seattle")


def pano(city: str, number: int) -> str:
    return f"{city[:2]}-_{number:018d},{40 + number / 8},{-80.5 - number / 8},.jpg"


def satellite(city: str, number: int) -> str:
    return f"satellite_{40 + number / 8}_{-80.5 - CITIES.index(city)}.png"


def label(city: str, number: int, positive: int) -> str:
    others = [k for k in range(5) if k != positive][:3]
    semi = " ".join(f"{satellite(city, other)} {100.5 + other} {-200.25 - other}" for other in others)
    return f"{pano(city, number)} {satellite(city, positive)} {number}.5 -{number}.25 {semi}"


def write_vigor(root: Path, jpeg: bytes) -> Path:
    """Four panoramas and five satellite images in each city; panoramas 0 and 1 share the positive 0."""
    for city in CITIES:
        for folder in (f"{city}/panorama", f"{city}/satellite", f"splits/{city}"):
            (root / folder).mkdir(parents=True)
        for number in range(4):
            (root / city / "panorama" / pano(city, number)).write_bytes(jpeg)
        for number in range(5):
            (root / city / "satellite" / satellite(city, number)).write_bytes(jpeg)
        rows = [label(city, number, positive) for number, positive in enumerate((0, 0, 1, 2))]
        for name, part in (
            ("same_area_balanced_train", rows[:3]),
            ("same_area_balanced_test", rows[3:]),
            ("pano_label_balanced", rows),
            ("satellite_list", [satellite(city, number) for number in range(5)]),
        ):
            (root / f"splits/{city}/{name}.txt").write_text("\n".join(part) + "\n")
    return root


@pytest.fixture
def vigor(tmp_path, make_jpeg) -> Path:
    return write_vigor(tmp_path / "raw", make_jpeg((20, 40), 0))


def split_of_cities(scan: SourceScan) -> dict[str, str]:
    return {pair.metadata["city"]: pair.split for pair in scan.pairs}


@pytest.mark.parametrize("base", ["", "VIGOR", "data/VIGOR"])
def test_layout_is_found_with_all_cities(base, vigor, tmp_path):
    moved = tmp_path / "user" / base
    moved.parent.mkdir(parents=True, exist_ok=True)
    vigor.rename(moved)
    scan = open_source(tmp_path / "user")
    assert scan.layout == "vigor"
    assert count_splits(scan.pairs) == {"train": 12, "val": 4}
    assert count_kinds(scan.problems) == {"reference_only": 8}


def test_pair_holds_the_positive_and_metadata_the_rest(vigor):
    pair = open_source(vigor).pairs[2]
    assert pair.key == "Ch-_000000000000000002"
    assert pair.split == "train"
    assert pair.ground == f"Chicago/panorama/{pano('Chicago', 2)}"
    assert pair.aerial == "Chicago/satellite/satellite_40.125_-80.5.png"
    assert pair.location_id == "satellite_40.125_-80.5"
    assert pair.location == Location(latitude_deg=40.25, longitude_deg=-80.75)
    assert pair.metadata == {
        "city": "Chicago",
        "offset_px": [2.5, -2.25],
        "semi_positives": [
            {"aerial": "satellite_40.0_-80.5", "offset_px": [100.5, -200.25]},
            {"aerial": "satellite_40.25_-80.5", "offset_px": [102.5, -202.25]},
            {"aerial": "satellite_40.375_-80.5", "offset_px": [103.5, -203.25]},
        ],
    }


def test_pairs_of_one_satellite_image_share_their_location_id(vigor):
    first, second, third = open_source(vigor, split="train").pairs[:3]
    assert first.key != second.key
    assert first.location_id == second.location_id != third.location_id


def test_satellite_images_that_are_nobodys_positive_are_told(vigor):
    told = [problem for problem in open_source(vigor).problems if problem.path.startswith("Seattle")]
    assert [problem.path for problem in told] == [f"Seattle/satellite/{satellite('Seattle', k)}" for k in (3, 4)]
    assert not any(problem.is_unusable for problem in told)
    assert not open_source(vigor, split="val").problems  # of one split nothing is said about the rest
    (vigor / "splits/Seattle/satellite_list.txt").unlink()  # then the folder says what there is
    assert count_kinds(open_source(vigor).problems) == {"reference_only": 8}


def test_cross_area_trains_on_two_cities_and_measures_on_the_others(vigor):
    scan = open_source(vigor, split="cross-area")
    assert count_splits(scan.pairs) == {"train": 8, "val": 8}
    assert split_of_cities(scan) == {"NewYork": "train", "Seattle": "train", "Chicago": "val", "SanFrancisco": "val"}


def test_unknown_split_names_the_known_ones(vigor):
    with pytest.raises(DataError, match=r"no split 'test'; it has train, val \(same area\) and cross-area"):
        open_source(vigor, split="test")


def test_corrected_labels_are_preferred(vigor):
    before = open_source(vigor)
    for city in CITIES:
        (vigor / f"splits__corrected/{city}").mkdir(parents=True)
        for path in (vigor / f"splits/{city}").iterdir():
            ending = "" if path.stem == "satellite_list" else "__corrected"
            corrected = path.read_text().replace(".5 -", ".75 -")
            (vigor / f"splits__corrected/{city}/{path.stem}{ending}.txt").write_text(corrected)
    after = open_source(vigor)
    assert [pair.key for pair in after.pairs] == [pair.key for pair in before.pairs]
    assert (before.pairs[1].metadata["offset_px"], after.pairs[1].metadata["offset_px"]) == (
        [1.5, -1.25],
        [1.75, -1.25],
    )


def test_city_without_images_or_lists_is_told_and_the_others_are_usable(vigor):
    (vigor / "Chicago").rename(vigor / "elsewhere")
    (vigor / "splits/Seattle/same_area_balanced_test.txt").unlink()
    (vigor / "splits/README.txt").write_text("Do not distribute.")
    report = validate(vigor, check_images=False)
    assert report.ok
    assert report.pairs == {"train": 9, "val": 2}
    told = [problem for problem in report.details if problem.kind == "absent_split"]
    assert [(problem.path, problem.detail) for problem in told] == [
        ("Chicago", "no Chicago/panorama: the city is left out"),
        ("splits/Seattle", "no same_area_balanced_test.txt: val of Seattle is left out"),
    ]


def test_city_of_neither_side_is_left_out_of_cross_area(vigor):
    for path in ("splits/Chicago", "Chicago"):
        (vigor / path).rename(vigor / path.replace("Chicago", "Delft"))
    scan = open_source(vigor, split="cross-area")
    assert count_splits(scan.pairs) == {"train": 8, "val": 4}
    assert "Delft is on neither side of cross-area" in [problem.detail for problem in scan.problems]


@pytest.mark.parametrize(
    "line",
    [
        "only,1,2,.jpg",
        label("Chicago", 0, 0).rsplit(" ", 1)[0],
        label("Chicago", 0, 0) + " 1",
        label("Chicago", 0, 0).replace(" 0.5 ", " nan ", 1),
        label("Chicago", 0, 0).replace(" 0.5 ", " east ", 1),
    ],
)
def test_row_that_is_no_label_is_a_bad_row(line, vigor):
    path = vigor / "splits/Chicago/same_area_balanced_train.txt"
    path.write_text(path.read_text() + line + "\n")
    scan = open_source(vigor, split="train")
    (problem,) = scan.problems
    assert len(scan.pairs) == 12
    assert (problem.kind, problem.path) == ("bad_row", "Chicago/same_area_balanced_train.txt:4")


@pytest.mark.parametrize("name", ["x,north,1,.jpg", "x,95,1,.jpg", "x,.jpg", "x.jpg", "x,nan,1,.jpg"])
def test_panorama_whose_name_holds_no_place_has_no_location(name, vigor):
    (vigor / "Chicago/panorama" / pano("Chicago", 3)).rename(vigor / "Chicago/panorama" / name)
    path = vigor / "splits/Chicago/same_area_balanced_test.txt"
    path.write_text(path.read_text().replace(pano("Chicago", 3), name))
    scan = open_source(vigor, split="val")
    assert [(problem.kind, problem.key) for problem in scan.problems] == [("no_location", "x")]
    assert len(scan.pairs) == 4


def test_cities_without_labels_are_told(vigor):
    (vigor / "splits").rename(vigor / "labels")
    with pytest.raises(DataError, match="Chicago/ is there but splits/ has no label files"):
        open_source(vigor)
