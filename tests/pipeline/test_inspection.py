"""The contact sheet shows the right pixels, by ranges alone; the statistics are those that counting by hand gives."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cvft.errors import ConfigError, DataError, ShardError
from pipeline.geography import haversine_m
from pipeline.images import thumbnail
from pipeline.inspection import draw_sheet, statistics_table, write_page
from pipeline.manifest_statistics import manifest_statistics
from pipeline.report.contact_sheet import Card, contact_sheet
from pipeline.report.style import rasterise
from pipeline.storage import Store


def a_card(ground_px=(112, 616), aerial_px=(256, 256), colour=(200, 30, 30), title="0000001", lines=("train",)):
    images = [np.full((*size, 3), colour, dtype=np.uint8) for size in (ground_px, aerial_px)]
    return Card(ground=images[0], aerial=images[1], title=title, lines=lines)


def area_of(image, colour) -> int:
    return int((np.abs(np.asarray(image).astype(int) - colour).max(axis=2) < 12).sum())


class TestContactSheet:
    @pytest.mark.parametrize("num", [1, 2, 4])
    def test_every_card_has_its_place_on_the_sheet(self, num):
        colours = [(250, 20 * number, 0) for number in range(num)]
        image = rasterise(contact_sheet([a_card(colour=colour) for colour in colours], title="a shard"))
        for colour in colours:
            assert area_of(image, colour) == pytest.approx(400 * 400 * 112 / 616 + 200 * 200, rel=0.03)

    @pytest.mark.parametrize(
        ("ground_px", "aerial_px"), [((832, 1664), (400, 400)), ((1000, 20), (20, 1000)), ((1, 1), (1000, 10))]
    )
    def test_images_of_any_shape_stay_within_their_card(self, ground_px, aerial_px):
        cards = [a_card(ground_px, aerial_px, colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
        image = np.asarray(rasterise(contact_sheet(cards, title="odd")))
        for number in range(3):
            columns = np.flatnonzero((image[..., number] > 200).any(axis=0) & (image.sum(axis=2) < 400).any(axis=0))
            part = image[:, 24 + number * 424 - 2 : 24 + number * 424 + 402]
            assert len(columns)
            total = area_of(image, [250 * (channel == number) for channel in range(3)])
            assert area_of(part, [250 * (channel == number) for channel in range(3)]) == total

    def test_any_text_is_drawn(self):
        strange = a_card(title="k" * 200, lines=["$x_1^2$ {", "Zürich 北京", ""])
        assert rasterise(contact_sheet([strange], title="$")).width == 448


class TestSheetOfAManifest:
    @pytest.mark.parametrize("scheme", ["file", pytest.param("s3", marks=pytest.mark.objectstore)])
    def test_first_pairs_of_a_shard_are_read_by_range(self, scheme, cvusa, tmp_path, make_shards, request, monkeypatch):
        manifest = make_shards(
            cvusa, str(tmp_path / "store") if scheme == "file" else request.getfixturevalue("s3_uri")
        )
        reads = []
        read_range = Store.read_range
        monkeypatch.setattr(
            Store, "read_range", lambda *arguments: reads.append(arguments[3]) or read_range(*arguments)
        )
        monkeypatch.setattr(Store, "read_bytes", lambda *_: pytest.fail("a whole shard was read"))
        sheet = draw_sheet(manifest, num=2)
        assert sheet.width == 24 + 2 * 424
        assert len(reads) == 2
        assert sum(reads) < 0.6 * manifest.shards[0].num_bytes

    def test_sheet_shows_the_pairs_in_the_shards_order(self, cvusa, tmp_path, make_shards):
        manifest = make_shards(cvusa, str(tmp_path / "store"))
        rows = manifest.split("val").to_pylist()
        sheet = np.asarray(draw_sheet(manifest, split="val", num=4)).astype(int)
        top = 44 + 400 * 56 / 308 + 16.5 / 4
        for number, row in enumerate(rows[:3]):
            aerial = thumbnail((cvusa / f"bingmap/19/{row['key']}.jpg").read_bytes(), 200).astype(int)
            left = 24 + number * 424
            shown = sheet[round(top) + 40 : round(top) + 160, left + 40 : left + 160]
            assert np.abs(shown.mean(axis=(0, 1)) - aerial[37:150, 37:150].mean(axis=(0, 1))).max() < 4

    def test_shards_are_found_by_the_end_of_their_names(self, cvusa, tmp_path, make_shards):
        manifest = make_shards(cvusa, str(tmp_path / "store"))
        assert draw_sheet(manifest, shard="val-00001.tar").size == draw_sheet(manifest, shard="val-00001.tar").size
        with pytest.raises(DataError, match=r"'00001\.tar' is no shard of .*train-00000\.tar"):
            draw_sheet(manifest, shard="00001.tar")
        with pytest.raises(DataError, match="it has train, val"):
            draw_sheet(manifest, split="test")
        with pytest.raises(ConfigError, match="not both"):
            draw_sheet(manifest, split="val", shard="val-00001.tar")
        with pytest.raises(ConfigError, match="num: 0 must lie"):
            draw_sheet(manifest, num=0)

    def test_damaged_image_is_named(self, cvusa, tmp_path, make_shards):
        manifest = make_shards(cvusa, str(tmp_path / "store"))
        row = manifest.pairs.to_pylist()[1]
        path = tmp_path / "store" / manifest.shards[0].name
        content = bytearray(path.read_bytes())
        content[row["aerial_offset"] + 99] ^= 1
        path.write_bytes(content)
        with pytest.raises(ShardError, match=rf"train-00000.tar, key {row['key']}: the aerial image is damaged"):
            draw_sheet(manifest)


class TestStatistics:
    def test_numbers_are_those_of_the_raw_data(self, cvusa, tmp_path, make_shards):
        manifest = make_shards(cvusa, str(tmp_path / "store"))
        found = manifest_statistics(manifest)
        assert (found["pairs"], found["shards"], found["layout"]) == (16, 5, "cvusa")
        assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.rglob("*.tar"))
        val = found["splits"]["val"]
        keys = manifest.split("val")["key"].to_pylist()
        assert (val["pairs"], val["shards"], val["located"], val["locations"]) == (5, 2, 5, 5)
        assert val["sizes_px"] == {"ground": {"308x56": 5}, "aerial": {"187x187": 5}}
        grounds = [cvusa / f"streetview/panos/{key}.jpg" for key in keys]
        assert val["image_bytes"]["ground"] == sum(path.stat().st_size for path in grounds)
        # all.csv puts pair n at 60.2 + n * 1e-4, 24.9 + n * 2e-4
        assert val["extent"]["south_deg"] == pytest.approx(60.2011)
        assert val["extent"]["east_deg"] == pytest.approx(24.9030)
        step_m = haversine_m(60.2, 24.9, 60.2001, 24.9002)
        assert val["nearest_m"] == pytest.approx(float(step_m), rel=0.006)
        assert (val["leaks"], found["splits"]["train"]["leaks"]) == (0, None)

    def test_pairs_without_places_have_no_extent(self, tmp_path, make_shards, make_table, make_jpeg):
        for number in range(2):
            (tmp_path / f"g{number}.jpg").write_bytes(make_jpeg((56, 308), number))
            (tmp_path / f"a{number}.jpg").write_bytes(make_jpeg((187, 187 + number), number + 2))
        rows = [{"key": str(number), "ground": f"g{number}.jpg", "aerial": f"a{number}.jpg"} for number in range(2)]
        manifest = make_shards(make_table(tmp_path / "pairs.csv", rows), str(tmp_path / "store"))
        statistics = manifest_statistics(manifest)
        (split,) = statistics["splits"].values()
        assert (split["located"], split["extent"], split["nearest_m"]) == (0, None, None)
        table = {row[0]: row[1] for row in statistics_table(statistics)}
        assert table["where"] == table["nearest other pair (median)"] == "unknown"
        assert table["aerial images"].startswith(("187x187 (1), 188x187 (1)", "188x187 (1), 187x187 (1)"))

    def test_page_holds_numbers_and_sheet_and_escapes_what_it_is_given(self, cvusa, tmp_path, make_shards):
        manifest = make_shards(cvusa, str(tmp_path / "store"))
        statistics = manifest_statistics(manifest) | {"excluded": {"<b>odd</b>": 3}}
        write_page(statistics, draw_sheet(manifest, num=1), tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
        for words in ("16 pairs in 5 shards", "Layout cvusa, profile original", manifest.digest, "308x56", "odd&lt;/b"):
            assert words in text or words in page
        assert "<b>odd" not in page
        assert page.count("data:image/jpeg;base64,") == 1
        assert "http" not in page


def test_only_the_newest_manifest_is_of_a_generation(cvusa, tmp_path, make_shards):
    first = make_shards(cvusa, str(tmp_path / "store"))
    assert manifest_statistics(first)["generation"] == 1
    second = make_shards(cvusa, str(tmp_path / "store"), seed=1, rebuild=True)
    assert [manifest_statistics(manifest)["generation"] for manifest in (first, second)] == [None, 2]
