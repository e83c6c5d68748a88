"""CVUSA as users have it on disk: split lists, aerial tiles, panoramas and (not always) the locations.

splits/train-19zl.csv     bingmap/19/0041073.jpg,streetview/panos/0041073.jpg,streetview/annotations/0041073.png
split_locations/all.csv   row int(id), counted from 1: requested lat, lon, the panorama's own lat, lon, heading
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from pipeline.schema import Location
from pipeline.sources.base import Row, RowChecker, SourceScan, read_text

# Folders below the given root in which the dataset has been met.
BASES = ("", "CVUSA", "CVUSA/dataset", "CVPR_subset", "CVUSA/CVPR_subset", "dataset")
SPLIT_LISTS = "splits/*-19zl.csv"
LOCATION_LISTS = ("split_locations/all.csv", "split_locations/split/all.csv", "all.csv")
USUAL_SIZE_PX = {"ground": (224, 1232), "aerial": (750, 750)}
_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})


class CvusaSource:
    """The CVUSA layout, whose lists name an aerial tile, a panorama and an annotation that is not used."""

    looks_for = f"{SPLIT_LISTS} (here or in {', '.join(BASES[1:])})"

    def detect(self, root: Path) -> Path | None:
        """Return the folder that holds `splits/`."""
        return next((root / base for base in BASES if any((root / base).glob(SPLIT_LISTS))), None)

    def scan(self, base: Path, *, root: Path, split: str | None) -> SourceScan:
        """List the pairs of every split list, or of the list of `split` alone."""
        locations = _Locations.find(base, root)
        checker = RowChecker(root)
        for path in sorted(base.glob(SPLIT_LISTS)):
            name = path.name.removesuffix("-19zl.csv")
            if split is None or name == split:
                _scan_list(path, name, base=base, locations=locations, checker=checker)
        return SourceScan(
            layout="cvusa",
            root=root,
            pairs=checker.pairs,
            problems=checker.problems,
            usual_size_px=USUAL_SIZE_PX,
        )


def _scan_list(path: Path, split: str, *, base: Path, locations: _Locations, checker: RowChecker) -> None:
    for number, cells in enumerate(csv.reader(io.StringIO(read_text(path), newline="")), start=1):
        fields = [cell.strip() for cell in cells]
        if not any(fields):
            continue
        listed_in = f"{path.name}:{number}"
        if len(fields) < 2:
            checker.note(
                "bad_row", key=None, path=listed_in, detail=f"one column, expected aerial,ground: {fields[0]!r}"
            )
            continue
        aerial, ground = base / fields[0], base / fields[1]
        if number == 1 and aerial.suffix.lower() not in _IMAGE_SUFFIXES:
            continue  # a header, where none belongs
        location, trouble = locations.of(ground.stem)
        checker.add(
            Row(
                key=ground.stem,
                split=split,
                ground=ground,
                aerial=aerial,
                location=location,
                location_trouble=trouble,
                listed_in=listed_in,
            )
        )


class _Locations:
    """The rows of all.csv, or of no file at all."""

    def __init__(self, rows: list[list[str]], name: str) -> None:
        self._rows = rows
        self._name = name

    @classmethod
    def find(cls, base: Path, root: Path) -> _Locations:
        """Look beside the split lists first and then in the folders above, up to the root."""
        above = [folder for folder in base.parents if folder == root or root in folder.parents]
        for folder in (base, *above):
            for candidate in LOCATION_LISTS:
                path = folder / candidate
                if path.is_file():
                    rows = list(csv.reader(io.StringIO(read_text(path), newline="")))
                    has_header = bool(rows) and _numbers(rows[0]) is None
                    return cls(rows[has_header:], path.name)
        return cls([], "")

    def of(self, key: str) -> tuple[Location | None, str]:
        """Return the location of a pair, or None and why there is none."""
        if not self._name:
            return None, f"there is no {' or '.join(LOCATION_LISTS)}"
        if not (key.isascii() and key.isdigit() and 1 <= int(key) <= len(self._rows)):
            return None, f"id {key} is no row of {self._name}, which has {len(self._rows)}"
        numbers = _numbers(self._rows[int(key) - 1])
        if numbers is None:
            return None, f"row {int(key)} of {self._name} is not five numbers"
        # Columns 1-2 are the point that was asked for, 3-4 where the panorama was taken (median 9.2 m apart).
        _, _, latitude_deg, longitude_deg, heading_deg = numbers
        return Location(latitude_deg=latitude_deg, longitude_deg=longitude_deg, heading_deg=heading_deg), ""


def _numbers(cells: list[str]) -> list[float] | None:
    try:
        numbers = [float(cell) for cell in cells]
    except ValueError:
        return None
    return numbers if len(numbers) == 5 and all(map(math.isfinite, numbers)) else None
