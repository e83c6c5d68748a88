"""A pair's images are told damaged from odd, by kind; what is odd is used, what is damaged is not."""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.checks import check_image, exif_orientation, load_pair
from pipeline.images import MAX_PIXELS
from pipeline.schema import ROLES, ImageRules
from pipeline.sources.detect import open_source
from pipeline.sources.kinds import KINDS, NOTED_KINDS, UNUSABLE_KINDS

NO_RULES = ImageRules()


def encode(*, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 40), orientation: int = 1) -> bytes:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    stream = io.BytesIO()
    picture.save(stream, kind, exif=exif)
    return stream.getvalue()


def png_that_claims(width_px: int, height_px: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_that_claims(width_px: int, height_px: int) -> bytes:
    data = encode()
    start = data.index(b"\xff\xc0")
    return data[: start + 5] + struct.pack(">HH", height_px, width_px) + data[start + 9 :]


def damage(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(100) + data[middle + 100 :]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty_file"),
        (encode()[:-200], "truncated"),
        (encode()[:700] + bytes(2000), "truncated"),
        (encode()[:10], "truncated"),
        (damage(encode()), "unreadable"),
        (b"<html>404</html>", "unreadable"),
        (encode(kind="GIF"), "unreadable"),
        (encode(kind="PNG")[:200], "unreadable"),
        (png_that_claims(20_000, 20_000), "too_large"),
        (png_that_claims(2**31 - 1, 2**31 - 1), "too_large"),
        (jpeg_that_claims(65_000, 65_000), "too_large"),
    ],
)
def test_image_that_cannot_be_used_is_told_by_one_unusable_kind(data, kind):
    info, kinds = check_image(data, "a.jpg", usual_px=None, check_images=True)
    assert info is None
    assert list(kinds) == [kind]
    assert kind in UNUSABLE_KINDS


@pytest.mark.parametrize("data", [png_that_claims(20_000, 20_000), jpeg_that_claims(65_000, 65_000)])
def test_bomb_is_never_decoded_even_where_images_are_not_checked(data):
    assert MAX_PIXELS < 20_000**2
    assert list(check_image(data, "a.jpg", usual_px=None, check_images=False)[1]) == ["too_large"]


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (encode(), []),
        (encode(kind="PNG"), ["not_jpeg"]),
        (encode(mode="L"), ["greyscale"]),
        (encode(kind="PNG", mode="LA"), ["not_jpeg", "greyscale"]),
        (encode(mode="CMYK"), ["cmyk"]),
        (encode(orientation=6), ["exif_rotated"]),
        (encode(size=(50, 40)), ["odd_size"]),
    ],
)
def test_odd_image_is_noted_and_used(data, kinds):
    info, found = check_image(data, "a.JPG", usual_px=((40, 40),), check_images=True)
    assert info is not None
    assert list(found) == kinds
    assert set(kinds) <= NOTED_KINDS


def test_png_under_its_own_name_is_nothing_odd():
    assert check_image(encode(kind="PNG"), "a.png", usual_px=None, check_images=True)[1] == {}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_what_pillow_reads(orientation):
    data = encode(orientation=orientation)
    assert exif_orientation(data) == orientation == Image.open(io.BytesIO(data)).getexif().get(0x0112, 1)


def test_exif_orientation_is_read_in_either_byte_order_and_after_other_segments():
    for order, mark in (("<", b"II"), (">", b"MM")):
        entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 3, 0)
        tiff = mark + struct.pack(f"{order}HIH", 42, 8, 1) + entry
        segment = b"\xff\xe1" + struct.pack(">H", 8 + len(tiff)) + b"Exif\0\0" + tiff
        jfif = b"\xff\xe0\x00\x04ab"
        assert exif_orientation(b"\xff\xd8" + jfif + segment) == 3


def test_damaged_exif_turns_nothing():
    data = encode(orientation=6)
    start = data.index(b"Exif\0\0") + 6
    for cut in range(30):
        exif_orientation(data[: start + cut])
    for position in range(start, start + 26):
        for value in (0, 0x7F, 0xFF):
            damaged = bytearray(data)
            damaged[position] = value
            assert 1 <= exif_orientation(bytes(damaged)) <= 8


def test_loaded_pair_holds_the_files_own_bytes_and_sizes(cvusa):
    scan = open_source(cvusa)
    pair = scan.pairs[3]
    images, problems = load_pair(pair, scan.root, rules=NO_RULES, check_images=True)
    assert not problems
    assert {role: image.data for role, image in images.items()} == {
        role: (cvusa / getattr(pair, role)).read_bytes() for role in ROLES
    }
    assert (images["aerial"].info.height_px, images["ground"].info.width_px) == (187, 308)


def test_only_the_view_that_cannot_be_used_is_left_out_and_each_trouble_is_named(cvusa):
    scan = open_source(cvusa)
    pair = scan.pairs[0]
    (cvusa / pair.ground).write_bytes(encode(mode="L", orientation=8))
    (cvusa / pair.aerial).write_bytes(b"")
    images, problems = load_pair(pair, scan.root, rules=NO_RULES, check_images=True)
    assert set(images) == {"ground"}
    assert [(problem.kind, problem.path, problem.key) for problem in problems] == [
        ("greyscale", pair.ground, pair.key),
        ("exif_rotated", pair.ground, pair.key),
        ("empty_file", pair.aerial, pair.key),
    ]


def test_file_that_has_gone_or_became_a_folder_after_the_scan_is_named(cvusa):
    scan = open_source(cvusa)
    pair = scan.pairs[0]
    for name in (pair.ground, pair.aerial):
        (cvusa / name).unlink()
    (cvusa / pair.aerial).mkdir()
    images, problems = load_pair(pair, scan.root, rules=NO_RULES, check_images=True)
    assert not images
    assert [problem.kind for problem in problems] == ["missing_ground", "missing_aerial"]


def test_rows_that_are_used_come_from_the_pair_or_else_from_its_layouts_rule(cvusa):
    scan = open_source(cvusa)
    pair = scan.pairs[0]
    rules = ImageRules(ground_rows_px={(56, 308): (14, 42), (187, 187): (1, 2)})
    images, _ = load_pair(pair, scan.root, rules=rules, check_images=False)
    assert (images["ground"].rows_px, images["aerial"].rows_px) == ((14, 42), None)
    pair = dataclasses.replace(pair, ground_rows_px=(0, 7))
    images, _ = load_pair(pair, scan.root, rules=rules, check_images=False)
    assert images["ground"].rows_px == (0, 7)


def test_aerial_that_is_not_square_is_odd_where_the_layout_knows_no_size(cvusa):
    scan = open_source(cvusa)
    (cvusa / scan.pairs[0].aerial).write_bytes(encode(size=(50, 40)))
    _, (problem,) = load_pair(scan.pairs[0], scan.root, rules=NO_RULES, check_images=True)
    assert (problem.kind, problem.detail) == ("odd_size", "50x40, an aerial image is usually square")


def test_every_kind_says_why_it_matters_and_what_to_do():
    assert set(KINDS) == UNUSABLE_KINDS | NOTED_KINDS
    for kind in KINDS.values():
        for sentence in (kind.consequence, kind.remedy):
            assert sentence.endswith(".")
            assert sentence[0].isupper()
