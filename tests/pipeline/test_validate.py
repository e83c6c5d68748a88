"""`validate` tells damaged images from odd ones, by kind and by name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvft.errors import DataError
from pipeline.checks import load_pair
from pipeline.schema import ImageRules
from pipeline.sources.detect import open_source
from pipeline.validate import validate


def reencode(path: Path, *, mode: str = "RGB", kind: str = "JPEG", size: tuple[int, int] | None = None) -> None:
    with Image.open(path) as image:
        changed = image.resize(size or image.size).convert(mode)
    stream = io.BytesIO()
    changed.save(stream, kind)
    path.write_bytes(stream.getvalue())


def test_clean_dataset_is_ok_and_counted(cvusa):
    seen = []
    report = validate(cvusa, progress=lambda done, total: seen.append((done, total)))
    assert (report.layout, report.ok, report.pairs) == ("cvusa", True, {"train": 11, "val": 5})
    assert report.problems == {"odd_size": 32}  # the test's images are a quarter of CVUSA's
    assert seen == [(number, 16) for number in range(1, 17)]
    assert not report.summary


def test_truncated_jpeg_is_not_ok_and_is_named(cvusa):
    path = cvusa / "bingmap/19/0000004.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    report = validate(cvusa)
    assert not report.ok
    assert report.pairs == {"train": 10, "val": 5}
    assert report.problems["truncated"] == 1
    assert "first: bingmap/19/0000004.jpg: truncated" in report.summary
    assert "\n" not in report.summary


def test_jpeg_filled_up_with_zeros_is_truncated(cvusa):
    path = cvusa / "bingmap/19/0000004.jpg"
    data = path.read_bytes()
    path.write_bytes(data[:500] + bytes(len(data) - 500))
    assert validate(cvusa).problems["truncated"] == 1


def test_broken_entropy_data_is_unreadable(cvusa):
    path = cvusa / "streetview/panos/0000001.jpg"
    data = bytearray(path.read_bytes())
    data[700:1000] = bytes(300)
    path.write_bytes(bytes(data))
    assert validate(cvusa).problems["unreadable"] == 1


def test_other_kinds_of_file_are_unreadable(cvusa):
    (cvusa / "bingmap/19/0000001.jpg").write_bytes(b"<html>404</html>")
    reencode(cvusa / "bingmap/19/0000002.jpg", kind="GIF")
    report = validate(cvusa)
    assert not report.ok
    assert report.problems["unreadable"] == 2


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("not_jpeg", {"kind": "PNG"}),
        ("greyscale", {"mode": "L"}),
        ("cmyk", {"mode": "CMYK"}),
        ("odd_size", {"size": (750, 740)}),
    ],
)
def test_odd_image_is_noted_and_its_pair_used(kind, change, cvusa):
    reencode(cvusa / "bingmap/19/0000001.jpg", **({"size": (750, 750)} | change))
    report = validate(cvusa)
    assert report.ok
    assert report.pairs == {"train": 11, "val": 5}
    expected = {"odd_size": 32} if kind == "odd_size" else {kind: 1, "odd_size": 31}
    assert report.problems == expected


def test_table_expects_nothing_but_square_aerials(tmp_path, make_table):
    for name, shape in (("g", (30, 90, 3)), ("square", (40, 40, 3)), ("wide", (40, 41, 3))):
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / f"{name}.jpg")
    place = {"latitude": "1", "longitude": "2"}
    rows = [{"key": key, "ground": "g.jpg", "aerial": f"{key}.jpg"} | place for key in ("square", "wide")]
    make_table(tmp_path / "pairs.csv", rows)
    report = validate(tmp_path)
    assert report.ok
    assert [(problem.kind, problem.key) for problem in report.details] == [("odd_size", "wide")]


def test_without_image_checks_only_files_are_looked_at(cvusa):
    (cvusa / "bingmap/19/0000001.jpg").write_bytes(b"<html>404</html>")
    assert validate(cvusa, check_images=False).ok


def test_dataset_without_pairs_is_not_ok(tmp_path):
    (tmp_path / "pairs.csv").write_text("key,ground,aerial\n")
    report = validate(tmp_path)
    assert not report.ok
    assert report.summary == "no pair is listed"


def test_unknown_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no known layout"):
        validate(tmp_path)


def test_file_that_became_a_folder_after_the_scan_is_missing(cvusa):
    scan = open_source(cvusa)
    (cvusa / scan.pairs[0].aerial).unlink()
    (cvusa / scan.pairs[0].aerial).mkdir()
    images, (problem,) = load_pair(scan.pairs[0], scan.root, rules=ImageRules(), check_images=True)
    assert set(images) == {"ground"}
    assert (problem.kind, problem.path) == ("missing_aerial", scan.pairs[0].aerial)
