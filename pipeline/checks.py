"""What is wrong with a pair's two images: missing, damaged, too large or odd; `sources.kinds` says why each matters.

The same checks serve `validate` and the tasks that write shards. Without decoding, those pass thousands of pairs a
second: beyond reading the files a pair costs some 20 microseconds here.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from cvft.errors import DataError
from pipeline.images import ImageInfo, TooLargeError, check_decodes, read_info
from pipeline.raw import RawFolder
from pipeline.schema import ImageRules, PairSource
from pipeline.sources.base import Problem, printable

_JPEG_SUFFIXES = (".jpg", ".jpeg")
_START_OF_JPEG, _END_OF_JPEG = b"\xff\xd8", b"\xff\xd9"
_GREYSCALE = frozenset({"Gray", "L", "1", "I", "LA", "I;16"})
_CMYK = frozenset({"CMYK", "YCCK"})
_APP1, _APPLICATION_SEGMENTS = 0xE1, range(0xE0, 0xF0)
_ORIENTATION_TAG = 0x0112


class LoadedImage(NamedTuple):
    """One image as it will stand in a shard.

    Attributes:
        data: Its own bytes.
        info: What its header says.
        rows_px: Rows [first, stop) of it that are used; none for all.
    """

    data: bytes
    info: ImageInfo
    rows_px: tuple[int, int] | None = None


def load_pair(
    pair: PairSource, root: RawFolder, *, rules: ImageRules, check_images: bool
) -> tuple[dict[str, LoadedImage], list[Problem]]:
    """Read a pair's two images and say what is wrong with them.

    Args:
        pair: The pair.
        root: What its files are relative to.
        rules: What the layout says about its images.
        check_images: Decode them too (at an eighth of their size), not only read their headers.

    Returns:
        The images by role (`ground`, `aerial`), those that cannot be used left out, and the problems.

    Raises:
        StoreError: The object store cannot be read.
    """
    images: dict[str, LoadedImage] = {}
    problems: list[Problem] = []
    for role, path in (("ground", pair.ground), ("aerial", pair.aerial)):
        data, kinds = _read(path, root, role=role)
        if data is not None:
            info, kinds = check_image(data, path, usual_px=rules.usual_sizes_px.get(role), check_images=check_images)
            if info is not None:
                rows_px = _used_rows(pair, info, rules) if role == "ground" else None
                images[role] = LoadedImage(data, info, rows_px)
                if role == "aerial" and info.height_px != info.width_px:
                    kinds.setdefault("odd_size", f"{_size(info)}, an aerial image is usually square")
        for kind, detail in kinds.items():
            problems.append(Problem(kind=kind, key=pair.key, path=printable(path), detail=printable(detail)))
    return images, problems


def check_image(
    data: bytes, path: str, *, usual_px: tuple[tuple[int, int], ...] | None, check_images: bool
) -> tuple[ImageInfo | None, dict[str, str]]:
    """Return what an image's header says, or None if it cannot be used, and what is wrong: kinds with details."""
    try:
        info = read_info(data)
        if check_images:
            check_decodes(data, info)
    except TooLargeError as error:
        return None, {"too_large": str(error)}
    except DataError as error:
        return None, {damage_kind(data): str(error)}
    kinds = {}
    if info.kind == "png" and path.lower().endswith(_JPEG_SUFFIXES):
        kinds["not_jpeg"] = "a PNG by its content"
    if info.colorspace in _GREYSCALE:
        kinds["greyscale"] = "one channel"
    elif info.colorspace in _CMYK:
        kinds["cmyk"] = "four channels"
    if usual_px is not None and (info.height_px, info.width_px) not in usual_px:
        usual = " or ".join(f"{width}x{height}" for height, width in usual_px)
        kinds["odd_size"] = f"{_size(info)}, usual is {usual}"
    if info.kind == "jpg" and (orientation := exif_orientation(data)) != 1:
        kinds["exif_rotated"] = f"EXIF orientation {orientation}"
    return info, kinds


def exif_orientation(data: bytes) -> int:
    """Return a JPEG's EXIF orientation, 1 to 8; 1 (as it is) where there is none or it makes no sense."""
    position = len(_START_OF_JPEG)
    while data[position : position + 1] == b"\xff" and data[position + 1] in _APPLICATION_SEGMENTS:
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position + 1] == _APP1 and data[position + 4 : position + 10] == b"Exif\0\0":
            return _orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    return 1


def _orientation(tiff: bytes) -> int:
    """Read the tag in a TIFF's first directory (TIFF 6.0, section 2)."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2], "")
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(num_entries):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, directory + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG:
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        return 1  # a damaged directory turns nothing
    return 1


def _read(path: str, root: RawFolder, *, role: str) -> tuple[bytes | None, dict[str, str]]:
    try:
        return root.read_bytes(path), {}
    except DataError as error:
        is_there = root.status(path) is not None
        return None, {"unreadable": str(error)} if is_there else {f"missing_{role}": "no such file"}


def _used_rows(pair: PairSource, info: ImageInfo, rules: ImageRules) -> tuple[int, int] | None:
    return pair.ground_rows_px or rules.ground_rows_px.get((info.height_px, info.width_px))


def damage_kind(data: bytes) -> str:
    """Return what kind of damage it is that keeps these bytes from being an image."""
    if not data:
        return "empty_file"
    # A download that broke off lacks the end marker; some tools fill the rest with zeros.
    is_cut = data.startswith(_START_OF_JPEG) and not data.rstrip(b"\0").endswith(_END_OF_JPEG)
    return "truncated" if is_cut else "unreadable"


def _size(info: ImageInfo) -> str:
    return f"{info.width_px}x{info.height_px}"
