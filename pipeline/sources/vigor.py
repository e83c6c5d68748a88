"""VIGOR as users have it on disk: a folder for each city, and lists that pair panoramas with satellite images.

<City>/panorama/<id>,<latitude>,<longitude>,.jpg         2048x1024
<City>/satellite/satellite_<latitude>_<longitude>.png    640x640
splits/<City>/same_area_balanced_{train,test}.txt        the same-area protocol: here the splits `train` and `val`
splits/<City>/pano_label_balanced.txt                    all panoramas of a city: the cross-area protocol
splits/<City>/satellite_list.txt                         all satellite images of a city

A row of a label file is the panorama, then four times a satellite image with an offset (dy, dx) in its pixels: one
positive, then three semi-positives. The positive makes the pair and is its `location_id`, which pairs may share; the
rest is in `metadata`, with satellite images named as `location_id` names them: without their suffix. The folder
`splits__corrected`, SliceMatch's labels with mended offsets, is preferred where it is there.

The split `cross-area` lists the cross-area protocol: train is New York and Seattle, val San Francisco and Chicago.

Satellite images that are nobody's positive are part of the protocol's references; pairs cannot hold them, so recall on
pairs is easier than published. Each is told as `reference_only`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

from cvft.errors import DataError
from pipeline.raw import RawFolder
from pipeline.schema import TRAIN, VAL, ImageRules, Location
from pipeline.sources.base import Row, RowChecker, SourceScan, join, nestings, printable, some_names

BASES = nestings("VIGOR", "dataset", "data")
LABEL_FOLDERS = ("splits__corrected", "splits")
SAME_AREA = {TRAIN: "same_area_balanced_train", VAL: "same_area_balanced_test"}
CROSS_AREA = "cross-area"
ALL_LABELS = "pano_label_balanced"
CROSS_AREA_SPLITS = {"NewYork": TRAIN, "Seattle": TRAIN, "SanFrancisco": VAL, "Chicago": VAL}
RULES = ImageRules(usual_sizes_px={"ground": ((1024, 2048),), "aerial": ((640, 640),)})
_ENDINGS = ("__corrected.txt", ".txt")
_NUM_FIELDS = 13
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class VigorSource:
    """The VIGOR layout, any number of its cities."""

    looks_for = f"splits/<City>/{SAME_AREA[TRAIN]}.txt beside <City>/panorama/ and <City>/satellite/"

    def detect(self, root: RawFolder) -> str | None:
        """Return the folder that holds the cities."""
        return next((base for base in BASES if _label_folder(root, base)), None)

    def near_miss(self, root: RawFolder) -> str:
        """Return cities without labels."""
        for base in BASES:
            for name in root.names(base):
                if root.has(join(base, f"{name}/panorama")) and root.has(join(base, f"{name}/satellite")):
                    found = some_names(root, join(base, "splits"))
                    return f"{join(base, printable(name))}/ is there but splits/ has no label files (it has {found})"
        return ""

    def scan(self, base: str, *, root: RawFolder, split: str | None) -> SourceScan:
        """List the pairs of the same-area protocol, of one of its splits, or of the `cross-area` protocol.

        Raises:
            DataError: There is no such split.
        """
        if split not in (None, TRAIN, VAL, CROSS_AREA):
            raise DataError(f"{root.uri}: VIGOR has no split {split!r}; it has train, val (same area) and {CROSS_AREA}")
        labels = _label_folder(root, base)
        checker = RowChecker(root)
        for city in root.names(join(base, labels)):
            if not root.names(join(base, f"{labels}/{city}")):
                continue  # a file among the cities
            if not root.has(join(base, f"{city}/panorama")):
                detail = f"no {city}/panorama: the city is left out"
                checker.note("absent_split", key=None, path=join(base, city), detail=detail)
                continue
            positives: set[str] = set()
            for one, name in _lists_of(root, join(base, f"{labels}/{city}"), city, split=split, checker=checker):
                for row in _rows(root, base, f"{labels}/{city}/{name}", split=one, checker=checker):
                    positives.add(row.location_id or "")
                    checker.add(row)
            if split in (None, CROSS_AREA):
                _note_references(root, base, f"{labels}/{city}", positives=positives, checker=checker)
        return SourceScan(layout="vigor", root=root, pairs=checker.pairs, problems=checker.problems, rules=RULES)


def _label_folder(root: RawFolder, base: str) -> str:
    """Return the folder that holds label files of at least one city, or an empty string."""
    for folder in LABEL_FOLDERS:
        for city in root.names(join(base, folder)):
            place = join(base, f"{folder}/{city}")
            if any(_label_file(root, place, name) for name in (*SAME_AREA.values(), ALL_LABELS)):
                return folder
    return ""


def _label_file(root: RawFolder, folder: str, name: str) -> str:
    names = (name + ending for ending in _ENDINGS)
    return next((name for name in names if root.status(join(folder, name)) is not None), "")


def _lists_of(
    root: RawFolder, folder: str, city: str, *, split: str | None, checker: RowChecker
) -> Iterator[tuple[str, str]]:
    """Yield (split, label file) of a city, and note what is not there."""
    if split != CROSS_AREA:
        wanted = {one: name for one, name in SAME_AREA.items() if split in (None, one)}
    elif city in CROSS_AREA_SPLITS:
        wanted = {CROSS_AREA_SPLITS[city]: ALL_LABELS}
    else:
        wanted = {}
        checker.note("absent_split", key=None, path=folder, detail=f"{city} is on neither side of {CROSS_AREA}")
    for one, name in wanted.items():
        found = _label_file(root, folder, name)
        if found:
            yield one, found
        else:
            detail = f"no {name}.txt: {one} of {city} is left out"
            checker.note("absent_split", key=None, path=folder, detail=detail)


def _rows(root: RawFolder, base: str, name: str, *, split: str, checker: RowChecker) -> Iterator[Row]:
    _, city, file_name = name.split("/")
    for number, line in enumerate(root.read_text(join(base, name)).splitlines(), start=1):
        fields = line.split()
        if not fields or (number == 1 and not fields[0].lower().endswith(_IMAGE_SUFFIXES)):
            continue  # a blank line, or a header where none belongs
        listed_in = f"{city}/{file_name}:{number}"
        metadata = _metadata(fields, city)
        if metadata is None:
            detail = "is not a panorama and four satellite images with two offsets each"
            checker.note("bad_row", key=None, path=listed_in, detail=f"{printable(line.strip()[:80])!r} {detail}")
            continue
        key, location = _name_parts(fields[0])
        yield Row(
            key=key,
            split=split,
            ground=join(base, f"{city}/panorama/{fields[0]}"),
            aerial=join(base, f"{city}/satellite/{fields[1]}"),
            location=location,
            location_trouble="the panorama's name is not <id>,<latitude>,<longitude>,",
            listed_in=listed_in,
            location_id=_stem(fields[1]),
            metadata=metadata,
        )


def _metadata(fields: list[str], city: str) -> dict[str, Any] | None:
    """Return what a label row says besides its pair, or None if it is no label row."""
    if len(fields) != _NUM_FIELDS:
        return None
    try:
        offsets = [[float(fields[k]), float(fields[k + 1])] for k in range(2, _NUM_FIELDS, 3)]
    except ValueError:
        return None
    if not all(math.isfinite(value) for offset in offsets for value in offset):
        return None
    semi_positives = [
        {"aerial": _stem(name), "offset_px": offset} for name, offset in zip(fields[4::3], offsets[1:], strict=True)
    ]
    return {"city": city, "offset_px": offsets[0], "semi_positives": semi_positives}


def _name_parts(name: str) -> tuple[str, Location | None]:
    """Return the id and the place that a panorama's name holds."""
    key, *rest = name.split(",")
    try:
        latitude_deg, longitude_deg = float(rest[0]), float(rest[1])
    except (IndexError, ValueError):
        return (key if rest else _stem(name)), None
    if not (abs(latitude_deg) <= 90 and abs(longitude_deg) <= 180):
        return key, None
    return key, Location(latitude_deg=latitude_deg, longitude_deg=longitude_deg)


def _note_references(root: RawFolder, base: str, folder: str, *, positives: set[str], checker: RowChecker) -> None:
    city = folder.rpartition("/")[2]
    listed = join(base, f"{folder}/satellite_list.txt")
    has_list = root.status(listed) is not None
    names = root.read_text(listed).split() if has_list else root.names(join(base, f"{city}/satellite"))
    images = {_stem(name): name for name in names if _suffix(name)}
    for _, name in sorted(item for item in images.items() if item[0] not in positives):
        checker.note(
            "reference_only",
            key=None,
            path=join(base, f"{city}/satellite/{name}"),
            detail="no panorama has it as its positive",
        )


def _stem(name: str) -> str:
    # Interned, because a satellite image is named in many rows.
    return sys.intern(name[: -len(suffix)] if (suffix := _suffix(name)) else name)


def _suffix(name: str) -> str:
    return next((suffix for suffix in _IMAGE_SUFFIXES if name.lower().endswith(suffix)), "")
