"""`validate` says which layout it is, what is there, and names every kind of dirt in every layout it can occur in."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvft.errors import DataError
from pipeline.sources.kinds import KINDS, NOTED_KINDS
from pipeline.validate import validate


@dataclass
class Dataset:
    """A small clean dataset: pairs 0 to 10 are in train, 11 to 15 in val."""

    layout: str
    root: Path
    ground: list[Path]
    aerial: list[Path]
    lists: dict[str, Path]
    expected: dict[str, int]

    def append(self, split: str, line: bytes) -> None:
        with self.lists[split].open("ab") as stream:
            stream.write(line)


def cvusa_dataset(cvusa: Path, _: Callable) -> Dataset:
    keys = [f"{number:07d}" for number in range(1, 17)]
    return Dataset(
        layout="cvusa",
        root=cvusa,
        ground=[cvusa / f"streetview/panos/{key}.jpg" for key in keys],
        aerial=[cvusa / f"bingmap/19/{key}.jpg" for key in keys],
        lists={split: cvusa / f"splits/{split}-19zl.csv" for split in ("train", "val")},
        expected={"odd_size": 32},  # the test's images are a quarter of CVUSA's
    )


def table_dataset(cvusa: Path, make_table: Callable) -> Dataset:
    """The same pairs as one's own table."""
    data = cvusa_dataset(cvusa, make_table)
    places = list(csv.reader((cvusa / "split_locations/all.csv").read_text().splitlines()))
    rows = [
        {
            "key": ground.stem,
            "ground": str(ground.relative_to(cvusa)),
            "aerial": str(aerial.relative_to(cvusa)),
            "split": "train" if number < 11 else "val",
            **dict(zip(("latitude", "longitude", "heading_deg"), places[number][2:], strict=True)),
        }
        for number, (ground, aerial) in enumerate(zip(data.ground, data.aerial, strict=True))
    ]
    shutil.rmtree(cvusa / "splits")
    table = make_table(cvusa / "pairs.csv", rows)
    return Dataset("table", cvusa, data.ground, data.aerial, {"train": table, "val": table}, {})


LAYOUTS = {"cvusa": cvusa_dataset, "table": table_dataset}


@pytest.fixture(params=sorted(LAYOUTS))
def data(request, cvusa, make_table) -> Dataset:
    return LAYOUTS[request.param](cvusa, make_table)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def zero_the_end(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:500] + bytes(len(content) - 500))


def zero_the_middle(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:700] + bytes(300) + content[1000:])


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def reencode(
    path: Path, *, mode: str = "RGB", kind: str = "JPEG", size: tuple[int, int] | None = None, **options
) -> None:
    with Image.open(path) as image:
        changed = image.resize(size or image.size).convert(mode)
    stream = io.BytesIO()
    changed.save(stream, kind, **options)
    path.write_bytes(stream.getvalue())


def turn(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    reencode(path, exif=exif)


def claim(path: Path) -> None:
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = b"\xfe\x00\xfe\x00"
    path.write_bytes(content)


# Every kind of dirt of an image file: what is done to it, and what must be counted.
FILE_DIRT = {
    "no file": (Path.unlink, "missing"),
    "a folder": (as_folder, "missing"),
    "zero bytes": (lambda path: path.write_bytes(b""), "empty_file"),
    "download broke off": (cut, "truncated"),
    "filled up with zeros": (zero_the_end, "truncated"),
    "broken in the middle": (zero_the_middle, "unreadable"),
    "error page": (lambda path: path.write_bytes(b"<html>404</html>"), "unreadable"),
    "a GIF": (lambda path: reencode(path, kind="GIF"), "unreadable"),
    "bomb": (claim, "too_large"),
    "a PNG": (lambda path: reencode(path, kind="PNG"), "not_jpeg"),
    "greyscale": (lambda path: reencode(path, mode="L"), "greyscale"),
    "CMYK": (lambda path: reencode(path, mode="CMYK"), "cmyk"),
    "rotated": (turn, "exif_rotated"),
}


@pytest.mark.parametrize("role", ["ground", "aerial"])
@pytest.mark.parametrize("dirt", FILE_DIRT)
def test_each_dirt_of_a_file_is_counted_and_named(dirt, role, data):
    soil, kind = FILE_DIRT[dirt]
    kind = f"missing_{role}" if kind == "missing" else kind
    path = getattr(data, role)[2]
    soil(path)
    report = validate(data.root, layout=data.layout)
    lost = report.pairs != {"train": 11, "val": 5}
    assert lost == KINDS[kind].is_unusable == (not report.ok)
    others = {name: count for name, count in report.problems.items() if name != "odd_size"}
    assert others == {kind: 1}
    (problem,) = (one for one in report.details if one.kind == kind)
    assert (problem.path, problem.key) == (str(path.relative_to(data.root)), "0000003")
    if lost:
        assert report.pairs == {"train": 10, "val": 5}
        assert kind in report.summary
        assert "\n" not in report.summary


def same_row(data: Dataset) -> None:
    line = data.lists["train"].read_bytes().splitlines()[-1]
    data.append("train", line + b"\r\n")


def other_files(data: Dataset) -> None:
    line = data.lists["train"].read_bytes().splitlines()[-1]
    data.append("train", re.sub(rb"bingmap/19/\d+", b"bingmap/19/0000001", line) + b"\n")


def blank_lines(data: Dataset) -> None:
    content = data.lists["val"].read_bytes()
    data.lists["val"].write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n") + b"\r\n\r\n")


def short_row(data: Dataset) -> None:
    data.append("val", b"0000001\n")


def share_ground(data: Dataset) -> None:
    shutil.copy(data.ground[1], data.ground[12])


def share_aerial(data: Dataset) -> None:
    shutil.copy(data.aerial[1], data.aerial[12])


def twin_ground(data: Dataset) -> None:
    shutil.copy(data.ground[13], data.ground[12])


def twin_aerial(data: Dataset) -> None:
    shutil.copy(data.aerial[1], data.aerial[2])


def share_place(data: Dataset, source: int = 1, target: int = 12) -> None:
    """Give a pair another one's place, in whatever file the places are."""
    path = data.root / "split_locations/all.csv" if data.layout == "cvusa" else data.lists["val"]
    lines = path.read_text().splitlines()
    first = int(data.layout == "table")
    cells = [lines[number + first].split(",") for number in (source, target)]
    lines[target + first] = ",".join([*cells[1][:-3], *cells[0][-3:]])
    path.write_text("\n".join(lines))


def twin_place(data: Dataset) -> None:
    share_place(data, source=13, target=15)


def without_place(data: Dataset) -> None:
    if data.layout == "cvusa":
        path = data.root / "split_locations/all.csv"
        path.write_text("\n".join(path.read_text().splitlines()[:-2]))
    else:
        path = data.lists["val"]
        path.write_text(re.sub(r"^(000001[56].*,)[\d.]+(,[\d.]+,[\d.]+)$", r"\1\2", path.read_text(), flags=re.M))


def unspeakable_name(data: Dataset) -> None:
    old, new = data.ground[0].name.encode(), b"caf\xe9.jpg"
    os.rename(data.ground[0], os.fsencode(data.ground[0].parent) + b"/" + new)
    content = data.lists["train"].read_bytes()
    data.lists["train"].write_bytes(content.replace(b"panos/" + old, b"panos/" + new))


# Every kind of dirt of lists and of pairs: what is done, what must be counted, and in which layouts it can occur.
DATASET_DIRT = {
    "row twice": (same_row, {"duplicate_row": 1}, LAYOUTS),
    "id twice with other files": (other_files, {"duplicate_key": 1}, LAYOUTS),
    "CRLF, byte-order mark and blank lines": (blank_lines, {}, LAYOUTS),
    "row too short": (short_row, {"bad_row": 1}, LAYOUTS),
    "panorama in both splits": (share_ground, {"leak_ground_bytes": 1}, LAYOUTS),
    "aerial in both splits": (share_aerial, {"leak_aerial_bytes": 1}, LAYOUTS),
    "panorama twice": (twin_ground, {"duplicate_ground_bytes": 1}, LAYOUTS),
    "aerial twice": (twin_aerial, {"duplicate_aerial_bytes": 1}, LAYOUTS),
    "place in both splits": (share_place, {"leak_position_and_heading": 1}, LAYOUTS),
    "place twice": (twin_place, {"duplicate_position_and_heading": 1}, LAYOUTS),
    "id without location": (without_place, {"no_location": 2}, LAYOUTS),
    "name that is not UTF-8": (unspeakable_name, {"non_utf8_name": 1}, ("table",)),
}


@pytest.mark.parametrize("dirt", DATASET_DIRT)
def test_each_dirt_of_lists_and_pairs_is_counted_and_named(dirt, data):
    soil, expected, layouts = DATASET_DIRT[dirt]
    if data.layout not in layouts:
        pytest.skip(f"cannot occur in {data.layout}")
    soil(data)
    report = validate(data.root, layout=data.layout)
    assert {kind: count for kind, count in report.problems.items() if kind not in data.expected} == expected
    assert report.ok == all(kind in NOTED_KINDS for kind in expected)
    assert all(problem.path and problem.detail for problem in report.details)


def test_clean_dataset_is_ok_and_told(data):
    seen = []
    report = validate(data.root, progress=lambda done, total: seen.append((done, total)))
    assert (report.layout, report.ok, report.pairs) == (data.layout, True, {"train": 11, "val": 5})
    assert report.problems == data.expected
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
    share_ground(data)
    share_aerial(data)
    share_place(data, source=3, target=14)
    twin_place(data)
    leaks = validate(data.root, layout=data.layout).leaks
    assert list(leaks) == ["val"]
    assert (leaks["val"].num_pairs, leaks["val"].num_leaked, leaks["val"].num_twins) == (5, 2, 2)
    assert leaks["val"].num_by_trait == {"ground_bytes": 1, "aerial_bytes": 1, "position_and_heading": 1}


def test_pairs_that_cannot_be_used_leak_nothing(data):
    share_ground(data)
    data.aerial[12].write_bytes(b"")
    assert validate(data.root, layout=data.layout).leaks["val"].num_leaked == 0


def test_without_images_only_files_and_places_are_looked_at(data):
    data.aerial[0].write_bytes(b"<html>404</html>")
    data.ground[4].unlink()
    share_ground(data)
    share_place(data)
    report = validate(data.root, layout=data.layout, check_images=False)
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
    one, eight = (validate(data.root, layout=data.layout, num_threads=number) for number in (1, 8))
    assert one.details == eight.details
    assert one.pairs == eight.pairs


@pytest.mark.objectstore
def test_an_object_store_is_told_the_same(cvusa, s3_uri):
    from pipeline.storage import Store  # noqa: PLC0415 (only where there is a server)

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
