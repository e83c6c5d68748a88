"""The page and the table of `validate`: the offenders are shown up to a cap, the rest is counted."""

from __future__ import annotations

import base64
import io
import re
import shutil

import pytest
from PIL import Image

from pipeline.report.validation import build_validation_page
from pipeline.report.validation_text import format_bytes, ordered_kinds, validation_text
from pipeline.sources.kinds import KINDS
from pipeline.validate import validate
from tests.pipeline.test_report_page import Page


@pytest.fixture
def dirty(cvusa):
    """Two damaged files, a missing one, a leak by bytes and one by place."""
    (cvusa / "bingmap/19/0000001.jpg").write_bytes(b"<html>404</html>")
    (cvusa / "bingmap/19/0000002.jpg").unlink()
    shutil.copy(cvusa / "streetview/panos/0000003.jpg", cvusa / "streetview/panos/0000013.jpg")
    places = (cvusa / "split_locations/all.csv").read_text().splitlines()
    places[15] = places[4]
    (cvusa / "split_locations/all.csv").write_text("\n".join(places))
    return cvusa


def read_page(html: str) -> tuple[Page, str]:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page, " ".join(" ".join(page.text).split())


def test_page_shows_every_kind_with_its_meaning_and_needs_nothing_but_itself(dirty, tmp_path):
    report = validate(dirty)
    html = build_validation_page(tmp_path / "out", report)
    assert html == tmp_path / "out/validation.html"
    page, text = read_page(html.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    for kind in report.problems:
        assert KINDS[kind].consequence in text
        assert KINDS[kind].remedy.replace("`", "") in text
    assert "cannot be decoded" in text
    assert "val: streetview/panos/0000013.jpg" in text
    assert "train: streetview/panos/0000003.jpg" in text


def test_pictures_are_thumbnails_of_the_offenders_up_to_the_cap(dirty, tmp_path):
    html = build_validation_page(tmp_path / "a.html", validate(dirty), num_shown=3).read_text(encoding="utf-8")
    page, text = read_page(html)
    pictures = [address for address in page.addresses if address.startswith("data:")]
    assert len(pictures) == 3 + 2 + 2  # odd sizes, and two pairs that leak, side by side
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as image:
            assert max(image.size) <= 420
    assert "and 26 more" in text


def test_names_from_the_disk_cannot_write_markup(tmp_path, make_table, make_jpeg):
    name = '<script>alert(1)</script>&".jpg'
    (tmp_path / "g.jpg").write_bytes(make_jpeg((40, 40), 0))
    make_table(tmp_path / "pairs.csv", [{"key": "a", "ground": "g.jpg", "aerial": name.replace("/", "")}])
    html = build_validation_page(tmp_path / "page.html", validate(tmp_path)).read_text(encoding="utf-8")
    page, _ = read_page(html)
    assert "script" not in page.tags


def test_dataset_without_pairs_has_a_page(tmp_path):
    (tmp_path / "pairs.csv").write_text("key,ground,aerial\n")
    html = build_validation_page(tmp_path / "page.html", validate(tmp_path)).read_text(encoding="utf-8")
    assert "no usable pair" in read_page(html)[1]


def test_table_names_each_kind_once_with_examples_and_the_rest_as_a_number(dirty):
    report = validate(dirty)
    text = " ".join(validation_text(report).split())
    for kind, count in report.problems.items():
        assert text.count(f" {kind}: {count:,} ") == 1
        assert KINDS[kind].consequence in text
    assert "val: 2 of 5 pairs (40.00%) stand in train as well" in text
    assert re.search(r"odd_size: 29 .*\.\.\. and 26 more", text)
    assert "Not usable as it is" in text


def test_unusable_kinds_stand_first_then_leaks(dirty):
    assert ordered_kinds(validate(dirty)) == [
        "missing_aerial",
        "unreadable",
        "leak_ground_bytes",
        "leak_position_and_heading",
        "odd_size",
    ]


def test_bytes_are_written_as_people_do():
    assert [format_bytes(number) for number in (0, 999, 1000, 1_250_000, 7.1e9, 2e13)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.2 MB",
        "7.1 GB",
        "20.0 TB",
    ]
