"""`validate` says which layout it is, what is there, and names every kind of dirt in every layout."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from cvft.errors import DataError
from pipeline.sources.kinds import KINDS
from pipeline.storage import Store
from pipeline.validate import validate
from tests.pipeline.dirt import FILE_DIRT, FILES, PAIR_DIRT, Dataset, make_dataset, zero_the_middle

CLEAN = {"cvusa": {"odd_size": 32}, "cvact": {"odd_size": 32}, "vigor": {"odd_size": 32}, "table": {}}


@pytest.fixture(params=list(FILES))
def data(request, tmp_path) -> Dataset:
    return make_dataset(request.param, tmp_path / "raw")


def without_sizes(problems: dict[str, int]) -> dict[str, int]:
    """Leave out what the smallness of the test's images causes."""
    return {kind: count for kind, count in problems.items() if kind != "odd_size"}


@pytest.mark.parametrize("role", ["ground", "aerial"])
@pytest.mark.parametrize("dirt", FILE_DIRT)
def test_each_dirt_of_a_file_is_counted_and_named(dirt, role, data):
    soil, kind = FILE_DIRT[dirt]
    kind = f"missing_{role}" if kind == "missing" else kind
    path = getattr(data, role)[2]
    soil(path)
    report = validate(data.root)
    is_lost = KINDS[kind].is_unusable
    assert report.pairs == {"train": 11 - is_lost, "val": 5}
    assert report.ok == (not is_lost)
    assert without_sizes(report.problems) == {kind: 1}
    (problem,) = (one for one in report.details if one.kind == kind)
    assert (problem.path, "0000003" in problem.key) == (str(path.relative_to(data.root)), True)
    assert bool(report.summary) == is_lost
    assert kind in report.summary or not is_lost
    assert "\n" not in report.summary


@pytest.mark.parametrize("dirt", PAIR_DIRT)
def test_each_repetition_of_a_pair_is_counted_and_named(dirt, data):
    soil, kind = PAIR_DIRT[dirt]
    soil(data)
    report = validate(data.root)
    assert report.ok
    assert without_sizes(report.problems) == {kind: 1}
    (one,) = report.alike
    (problem,) = (problem for problem in report.details if problem.kind == kind)
    assert one.other.key in problem.detail
    assert one.pair.key == problem.key
    assert one.other.split == ("train" if kind.startswith("leak") or dirt == "aerial twice" else "val")


@pytest.mark.parametrize(
    ("places_of", "kind"),
    [({12: 1}, "leak_position_and_heading"), ({14: 13}, "duplicate_position_and_heading")],
)
@pytest.mark.parametrize("layout", FILES)
def test_each_repetition_of_a_place_is_counted(layout, places_of, kind, tmp_path):
    report = validate(make_dataset(layout, tmp_path, places_of=places_of).root)
    assert without_sizes(report.problems) == {kind: 1}


def test_clean_dataset_is_ok_and_told(data):
    seen = []
    report = validate(data.root, progress=lambda done, total: seen.append((done, total)))
    assert (report.layout, report.ok, report.pairs) == (data.layout, True, {"train": 11, "val": 5})
    assert report.problems == CLEAN[data.layout]
    assert seen == [(number, 16) for number in range(1, 17)]
    assert not report.summary
    ground, aerial = report.images["ground"], report.images["aerial"]
    assert (ground.num_files, ground.sizes_px) == (16, {(56, 308): 16})
    assert (aerial.num_files, aerial.sizes_px) == (16, {(187, 187): 16})
    assert ground.num_bytes == sum(path.stat().st_size for path in data.ground)


def test_layout_is_found_below_the_root_and_told_where(cvusa, tmp_path):
    (tmp_path / "user/CVUSA").mkdir(parents=True)
    cvusa.rename(tmp_path / "user/CVUSA/dataset")
    assert validate(tmp_path / "user").scan.base == "CVUSA/dataset"


def test_leaks_and_twins_are_counted_by_split_and_by_trait(data):
    for soil, _ in PAIR_DIRT.values():
        soil(data)
    leaks = validate(data.root).leaks
    assert list(leaks) == ["val"]
    assert (leaks["val"].num_pairs, leaks["val"].num_leaked, leaks["val"].num_twins) == (5, 1, 2)
    assert leaks["val"].num_by_trait == {"ground_bytes": 1, "aerial_bytes": 1, "position_and_heading": 0}


def test_pairs_that_cannot_be_used_leak_nothing(data):
    shutil.copy(data.ground[1], data.ground[12])
    data.aerial[12].write_bytes(b"")
    assert validate(data.root).leaks["val"].num_leaked == 0


@pytest.mark.parametrize("layout", FILES)
def test_without_images_only_files_and_places_are_looked_at(layout, tmp_path):
    data = make_dataset(layout, tmp_path, places_of={12: 1})
    data.aerial[0].write_bytes(b"<html>404</html>")
    data.ground[4].unlink()
    shutil.copy(data.ground[2], data.ground[13])
    report = validate(data.root, check_images=False)
    assert report.problems == {"missing_ground": 1, "leak_position_and_heading": 1}
    assert report.leaks["val"].num_by_trait == {"position_and_heading": 1}
    assert report.images["ground"].num_bytes > 0
    assert not report.images["ground"].sizes_px


def test_without_a_training_split_or_anything_to_compare_leaks_are_unknown(cvusa):
    assert validate(cvusa, train_split="absent").leaks is None
    (cvusa / "split_locations/all.csv").unlink()
    assert validate(cvusa, check_images=False).leaks is None
    assert validate(cvusa).leaks is not None


def test_any_number_of_threads_finds_the_same(data):
    for number, (soil, _) in enumerate(list(FILE_DIRT.values())[2:]):
        soil(data.ground[number])
    one, eight = (validate(data.root, num_threads=number) for number in (1, 8))
    assert one.details == eight.details
    assert one.pairs == eight.pairs


@pytest.mark.objectstore
def test_an_object_store_is_told_the_same(cvusa, s3_uri):
    zero_the_middle(cvusa / "bingmap/19/0000002.jpg")
    (cvusa / "streetview/panos/0000012.jpg").unlink()
    store = Store.from_uri(s3_uri)
    for path in cvusa.rglob("*.*"):
        store.write_bytes(str(path.relative_to(cvusa)), path.read_bytes())
    there, here = validate(s3_uri), validate(cvusa)
    assert (there.problems, there.pairs, there.leaks) == (here.problems, here.pairs, here.leaks)
    assert [str(problem) for problem in there.details] == [str(problem) for problem in here.details]


def test_table_expects_nothing_but_square_aerials(tmp_path, make_table):
    for name, shape in (("g", (30, 90, 3)), ("square", (40, 40, 3)), ("wide", (40, 41, 3))):
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / f"{name}.jpg")
    rows = [{"key": key, "ground": "g.jpg", "aerial": f"{key}.jpg"} for key in ("square", "wide")]
    make_table(tmp_path / "pairs.csv", [row | {"latitude": str(n), "longitude": "2"} for n, row in enumerate(rows)])
    report = validate(tmp_path)
    assert report.ok
    assert [(problem.kind, problem.key) for problem in report.details] == [
        ("odd_size", "wide"),
        ("duplicate_ground_bytes", "wide"),
    ]


def test_file_that_several_pairs_share_is_counted_once(tmp_path, make_table, make_jpeg):
    for name in ("a", "b", "sat"):
        (tmp_path / f"{name}.jpg").write_bytes(make_jpeg((40, 40), ord(name[0])))
    make_table(tmp_path / "pairs.csv", [{"key": key, "ground": f"{key}.jpg", "aerial": "sat.jpg"} for key in "ab"])
    images = validate(tmp_path).images
    assert (images["ground"].num_files, images["aerial"].num_files) == (2, 1)


def test_dataset_without_pairs_is_not_ok(tmp_path):
    (tmp_path / "pairs.csv").write_text("key,ground,aerial\n")
    report = validate(tmp_path)
    assert not report.ok
    assert report.summary == "no pair is listed"


def test_unknown_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no known layout"):
        validate(tmp_path)
