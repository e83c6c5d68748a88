"""The decode profiles against OpenCV, and what they do with damaged and unusual images."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from cvft.errors import DataError
from pipeline.images import ImageInfo, check_decodes, decode, encode_jpeg, read_info, thumbnail

SIZES = [
    ((750, 750), (256, 256)),  # CVUSA's aerial
    ((224, 1232), (112, 616)),  # CVUSA's panorama, exactly twice as large
    ((225, 1233), (112, 616)),  # odd sides: half is rounded up
    ((576, 1024), (112, 616)),  # half would be too narrow
    ((1200, 1200), (256, 256)),  # a quarter is still large enough
    ((100, 120), (256, 256)),  # smaller than wanted
]


def picture(size_px: tuple[int, int], seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return cv2.resize(coarse, size_px[::-1], interpolation=cv2.INTER_CUBIC)


def pillow_bytes(pixels: np.ndarray, *, mode: str = "RGB", kind: str = "JPEG", **options: bool) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def decoded(data: bytes, size_px: tuple[int, int], profile: str) -> np.ndarray:
    out = np.full((*size_px, 3), 77, np.uint8)
    decode(data, out, profile=profile)
    return out


def opencv_area(data: bytes, size_px: tuple[int, int]) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return cv2.resize(pixels, size_px[::-1], interpolation=cv2.INTER_AREA)[..., ::-1]


@pytest.mark.parametrize(("size_px", "target_px"), SIZES)
@pytest.mark.parametrize("is_progressive", [False, True])
def test_exact_equals_opencv_bit_for_bit(size_px, target_px, is_progressive):
    data = pillow_bytes(picture(size_px), quality=90, progressive=is_progressive)
    np.testing.assert_array_equal(decoded(data, target_px, "exact"), opencv_area(data, target_px))


@pytest.mark.parametrize(("size_px", "target_px"), SIZES)
def test_fast_is_within_a_few_grey_levels_of_exact(size_px, target_px):
    data = encode_jpeg(picture(size_px), quality=92)
    difference = np.abs(decoded(data, target_px, "fast").astype(int) - decoded(data, target_px, "exact"))
    assert difference.mean() < 2.5


def test_fast_halves_and_never_takes_three_eighths():
    data = encode_jpeg(picture((750, 750)))
    half = simplejpeg.decode_jpeg(data, min_height=375, min_width=375)
    assert half.shape == (375, 375, 3)
    expected = cv2.resize(half, (256, 256), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(decoded(data, (256, 256), "fast"), expected)


def test_fast_ground_needs_no_resize():
    data = encode_jpeg(picture((224, 1232)))
    half = simplejpeg.decode_jpeg(data, min_height=112, min_width=616)
    np.testing.assert_array_equal(decoded(data, (112, 616), "fast"), half)


@pytest.mark.parametrize("profile", ["exact", "fast"])
@pytest.mark.parametrize(("mode", "kind"), [("L", "JPEG"), ("L", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG")])
def test_unusual_kinds_become_rgb(profile, mode, kind):
    pixels = picture((300, 300))
    data = pillow_bytes(pixels, mode=mode, kind=kind)
    with Image.open(io.BytesIO(data)) as image:
        reference = np.asarray(image.convert("RGB"))
    expected = cv2.resize(reference, (128, 128), interpolation=cv2.INTER_AREA)
    difference = np.abs(decoded(data, (128, 128), profile).astype(int) - expected)
    assert difference.mean() < (3 if profile == "fast" else 0.6)


@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_cmyk_keeps_its_colours(profile):
    pixels = np.full((200, 200, 3), (200, 40, 90), np.uint8)
    data = pillow_bytes(pixels, mode="CMYK")
    assert read_info(data).colorspace in {"CMYK", "YCCK"}
    difference = np.abs(decoded(data, (64, 64), profile).astype(int) - pixels[:64, :64])
    assert difference.max() <= 6


def test_info_reads_content_and_not_names():
    assert read_info(encode_jpeg(picture((30, 50)))) == ImageInfo(
        kind="jpg", height_px=30, width_px=50, colorspace="YCbCr"
    )
    png = pillow_bytes(picture((30, 50)), kind="PNG")
    assert read_info(png) == ImageInfo(kind="png", height_px=30, width_px=50, colorspace="RGB")


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L")]
)
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.99])
def test_truncated_image_is_refused_everywhere(kind, mode, kept):
    data = pillow_bytes(picture((300, 300)), mode=mode, kind=kind)
    data = data[: int(len(data) * kept)]
    with pytest.raises(DataError):
        check_decodes(data, read_info(data))
    for profile in ("exact", "fast"):
        with pytest.raises(DataError):
            decoded(data, (64, 64), profile)


@pytest.mark.parametrize("shape", [(400, 100), (100, 400), (30, 20)])
def test_thumbnail_keeps_the_shape_and_never_enlarges(shape):
    small = thumbnail(encode_jpeg(picture(shape)), max_px=100)
    assert max(small.shape) == min(100, max(shape))
    assert small.shape[0] / small.shape[1] == pytest.approx(shape[0] / shape[1], rel=0.03)
    assert small.dtype == np.uint8


@pytest.mark.parametrize(("max_px", "rows"), [(1664, (208, 624)), (400, (208, 624)), (400, (209, 625))])
def test_thumbnail_of_some_rows_is_that_of_the_cut_image(max_px, rows):
    pixels = picture((832, 1664))
    small = thumbnail(encode_jpeg(pixels, quality=95), max_px, rows_px=rows)
    cut = cv2.resize(pixels[slice(*rows)], (max_px, max_px // 4), interpolation=cv2.INTER_AREA)
    assert small.shape == cut.shape
    assert np.abs(small.astype(int) - cut).mean() < 3


def test_encoded_jpeg_comes_back_nearly_the_same():
    pixels = picture((64, 96))
    difference = np.abs(decoded(encode_jpeg(pixels, quality=95), (64, 96), "exact").astype(int) - pixels)
    assert difference.mean() < 3


def striped(rows: slice) -> np.ndarray:
    """A panorama of CVACT's size: a picture where it is used, and red everywhere else."""
    pixels = np.zeros((832, 1664, 3), np.uint8)
    pixels[..., 0] = 255
    pixels[rows] = picture((rows.stop - rows.start, 1664))
    return pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("rows", "target_px"), [((208, 624), (112, 616)), ((208, 624), (56, 308)), ((3, 5), (8, 64))])
def test_exact_cut_equals_opencv_on_the_cut_bit_for_bit(rows, target_px, kind):
    data = pillow_bytes(striped(slice(208, 624)), kind=kind)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[slice(*rows)]
    expected = cv2.resize(pixels, target_px[::-1], interpolation=cv2.INTER_AREA)[..., ::-1]
    out = np.empty((*target_px, 3), np.uint8)
    decode(data, out, profile="exact", rows_px=rows)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("rows", "target_px", "factor"),
    [
        ((208, 624), (112, 616), 2),  # CVACT
        ((208, 624), (104, 416), 4),
        ((206, 622), (104, 416), 2),  # a quarter would cut at 51.5
        ((207, 623), (400, 832), 1),
        ((416, 832), (112, 616), 2),
    ],
)
def test_fast_cut_is_aligned_with_the_halved_image(rows, target_px, factor):
    data = pillow_bytes(picture((832, 1664)), quality=95)
    out = np.empty((*target_px, 3), np.uint8)
    decode(data, out, profile="fast", rows_px=rows)
    scaled = simplejpeg.decode_jpeg(data, min_height=832 // factor, min_width=1664 // factor)
    cut = scaled[rows[0] // factor : rows[1] // factor]
    is_gentle = cut.shape[0] < 2 * target_px[0] and cut.shape[1] < 2 * target_px[1]
    method = cv2.INTER_LINEAR if is_gentle else cv2.INTER_AREA
    np.testing.assert_array_equal(out, cv2.resize(cut, target_px[::-1], interpolation=method))


def test_rows_that_an_image_lacks_are_refused():
    with pytest.raises(DataError, match="rows 208 to 624 are wanted of 500"):
        decode(encode_jpeg(picture((500, 800))), np.empty((16, 16, 3), np.uint8), profile="fast", rows_px=(208, 624))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_preresized_image_is_taken_as_it_is(kind):
    data = pillow_bytes(picture((64, 96)), kind=kind)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image)
    np.testing.assert_array_equal(decoded(data, (64, 96), "preresized"), expected)


def test_preresized_image_of_another_size_is_refused():
    with pytest.raises(DataError, match="is 64x96, not 64x95 as a preresized one must be"):
        decoded(encode_jpeg(picture((64, 96))), (64, 95), "preresized")


def png_that_claims(height_px: int, width_px: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, body)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_that_claims(height_px: int, width_px: int) -> bytes:
    data = bytearray(encode_jpeg(picture((64, 64))))
    start_of_frame = data.index(b"\xff\xc0")
    data[start_of_frame + 5 : start_of_frame + 9] = struct.pack(">HH", height_px, width_px)
    return bytes(data)


@pytest.mark.parametrize(
    "data", [png_that_claims(60_000, 60_000), png_that_claims(2, 2**31 - 1), jpeg_that_claims(65_000, 65_000)]
)
def test_bomb_is_refused_before_it_is_decoded(data):
    tracemalloc.start()
    for use in (read_info, lambda data: decoded(data, (16, 16), "fast"), lambda data: thumbnail(data, 10)):
        with pytest.raises(DataError, match=r"claims \d+x\d+ pixels, more than the 200 million allowed"):
            use(data)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_large_image_below_the_limit_is_no_bomb_to_pillow_either():
    assert read_info(png_that_claims(10_000, 19_999)).width_px == 19_999


def test_check_without_colours_notices_what_decoding_in_colour_notices():
    data = encode_jpeg(picture((64, 96)), quality=90)
    generator = np.random.default_rng(0)
    num_noticed = 0
    for number in range(300):
        damaged = bytearray(data)
        position = int(generator.integers(650, len(data) - 64))
        if number % 3 == 0:
            damaged[position] ^= 1 << number % 8
        elif number % 3 == 1:
            damaged[position : position + 48] = bytes(48)
        else:
            del damaged[position:]
        info = read_info(data)
        verdicts = []
        for look in (check_decodes, lambda content, info: thumbnail(content, max(info.height_px, info.width_px) // 8)):
            try:
                look(bytes(damaged), info)
                verdicts.append(True)
            except DataError:
                verdicts.append(False)
        assert verdicts[0] == verdicts[1]
        num_noticed += not verdicts[0]
    assert num_noticed > 100
