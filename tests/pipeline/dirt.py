"""One small dataset in every layout, and everything that can happen to its image files and its pairs."""

from __future__ import annotations

import csv
import functools
import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from tests.pipeline.conftest import AERIAL_PX, GROUND_PX, random_jpeg

cached_jpeg = functools.cache(random_jpeg)

NUM_TRAIN, NUM_PAIRS = 11, 16
KEYS = [f"{number:07d}" for number in range(1, NUM_PAIRS + 1)]
FILES = {
    "cvusa": ("streetview/panos/{}.jpg", "bingmap/19/{}.jpg"),
    "cvact": ("ANU_data_small/streetview/{}_grdView.jpg", "ANU_data_small/satview_polish/{}_satView_polish.jpg"),
    "vigor": ("Seattle/panorama/{},{},{},.jpg", "Seattle/satellite/satellite_{}.jpg"),
    "table": ("photos/{}.jpg", "map/{}.jpg"),
}


@dataclass(frozen=True)
class Dataset:
    """The first eleven pairs are in train, the other five in val."""

    layout: str
    root: Path
    ground: list[Path]
    aerial: list[Path]


def make_dataset(layout: str, root: Path, *, places_of: Mapping[int, int] | None = None) -> Dataset:
    """Write a clean dataset: no two images are the same, and no two places but those asked for.

    Args:
        layout: One of `FILES`.
        root: Its folder.
        places_of: From a pair to another one whose place it gets.
    """
    owners = [(places_of or {}).get(number, number) for number in range(NUM_PAIRS)]
    places = [(60.2 + owner / 10_000, 24.9) for owner in owners]
    ground, aerial = (
        [root / name.format(key, *place) for key, place in zip(KEYS, places, strict=True)] for name in FILES[layout]
    )
    for number in range(NUM_PAIRS):
        for path, size in ((ground[number], GROUND_PX), (aerial[number], AERIAL_PX)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cached_jpeg(size, 2 * number + (size == GROUND_PX)))
    data = Dataset(layout, root, ground, aerial)
    WRITE_LISTS[layout](data, places, owners)
    return data


def _write_cvusa(data: Dataset, places: list[tuple[float, float]], owners: list[int]) -> None:
    rows = [f"bingmap/19/{key}.jpg,streetview/panos/{key}.jpg,{key}.png\n" for key in KEYS]
    (data.root / "splits").mkdir()
    (data.root / "splits/train-19zl.csv").write_text("".join(rows[:NUM_TRAIN]))
    (data.root / "splits/val-19zl.csv").write_text("".join(rows[NUM_TRAIN:]))
    (data.root / "all.csv").write_text("".join(f"0,0,{latitude},{longitude},5\n" for latitude, longitude in places))


def _write_cvact(data: Dataset, places: list[tuple[float, float]], owners: list[int]) -> None:
    numbers = np.arange(1, NUM_PAIRS + 1)[:, None]
    lists = {
        "trainSet": {"n": NUM_TRAIN, "trainInd": numbers[:NUM_TRAIN]},
        "valSet": {"n": NUM_PAIRS - NUM_TRAIN, "valInd": numbers[NUM_TRAIN:]},
        "valSetAll": {"n": 0, "valInd": numbers[:0]},
    }
    utm_m = np.array([(692_000.0 + 10 * owner, 6_092_000.0) for owner in owners])
    savemat(data.root / "ACT_data.mat", {"panoIds": np.array(KEYS), "utm": utm_m} | lists)
    (data.root / "ANU_data_test/satview_polish").mkdir(parents=True)


def _write_vigor(data: Dataset, places: list[tuple[float, float]], owners: list[int]) -> None:
    rows = [
        f"{ground.name} {aerial.name} 1 2" + f" {aerial.name} 3 4" * 3 + "\n"
        for ground, aerial in zip(data.ground, data.aerial, strict=True)
    ]
    folder = data.root / "splits/Seattle"
    folder.mkdir(parents=True)
    (folder / "same_area_balanced_train.txt").write_text("".join(rows[:NUM_TRAIN]))
    (folder / "same_area_balanced_test.txt").write_text("".join(rows[NUM_TRAIN:]))


def _write_table(data: Dataset, places: list[tuple[float, float]], owners: list[int]) -> None:
    with (data.root / "pairs.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["key", "ground", "aerial", "latitude", "longitude", "heading_deg", "split"])
        for number, key in enumerate(KEYS):
            files = [data.ground[number].relative_to(data.root), data.aerial[number].relative_to(data.root)]
            writer.writerow([key, *files, *places[number], 5, "train" if number < NUM_TRAIN else "val"])


WRITE_LISTS = {"cvusa": _write_cvusa, "cvact": _write_cvact, "vigor": _write_vigor, "table": _write_table}


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


def claim_gigabytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = b"\xfe\x00\xfe\x00"
    path.write_bytes(content)


def reencode(path: Path, *, mode: str = "RGB", kind: str = "JPEG", **options: object) -> None:
    with Image.open(path) as image:
        changed = image.convert(mode)
    stream = io.BytesIO()
    changed.save(stream, kind, **options)
    path.write_bytes(stream.getvalue())


def turn(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    reencode(path, exif=exif)


FILE_DIRT = {
    "no file": (Path.unlink, "missing"),
    "a folder": (as_folder, "missing"),
    "zero bytes": (lambda path: path.write_bytes(b""), "empty_file"),
    "download broke off": (cut, "truncated"),
    "filled up with zeros": (zero_the_end, "truncated"),
    "broken in the middle": (zero_the_middle, "unreadable"),
    "error page": (lambda path: path.write_bytes(b"<html>404</html>"), "unreadable"),
    "a GIF": (lambda path: reencode(path, kind="GIF"), "unreadable"),
    "bomb": (claim_gigabytes, "too_large"),
    "a PNG": (lambda path: reencode(path, kind="PNG"), "not_jpeg"),
    "greyscale": (lambda path: reencode(path, mode="L"), "greyscale"),
    "CMYK": (lambda path: reencode(path, mode="CMYK"), "cmyk"),
    "rotated": (turn, "exif_rotated"),
}
"""What is done to an image's file, and the kind that must be counted (`missing` is told by the view)."""

PAIR_DIRT = {
    "panorama in both splits": (lambda data: shutil.copy(data.ground[1], data.ground[12]), "leak_ground_bytes"),
    "aerial in both splits": (lambda data: shutil.copy(data.aerial[1], data.aerial[12]), "leak_aerial_bytes"),
    "panorama twice": (lambda data: shutil.copy(data.ground[13], data.ground[14]), "duplicate_ground_bytes"),
    "aerial twice": (lambda data: shutil.copy(data.aerial[1], data.aerial[2]), "duplicate_aerial_bytes"),
}
"""What is done to two pairs, and the kind that must be counted."""
