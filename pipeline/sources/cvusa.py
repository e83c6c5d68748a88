"""CVUSA as users have it on disk: split lists, aerial tiles, panoramas and (not always) the locations.

splits/train-19zl.csv     bingmap/19/0041073.jpg,streetview/panos/0041073.jpg,streetview/annotations/0041073.png
split_locations/all.csv   row int(id), counted from 1: requested lat, lon, the panorama's own lat, lon, heading
"""

from __future__ import annotations

import fnmatch
import math

from cvft.errors import DataError
from pipeline.raw import RawFolder
from pipeline.schema import ImageRules, Location
from pipeline.sources.base import Row, RowChecker, SourceScan, csv_rows, join, nestings, printable, some_names

# Folders below the given root in which the dataset has been met.
FOLDERS = ("CVUSA", "CVPR_subset", "dataset", "data")
BASES = nestings(*FOLDERS)
SPLIT_LISTS = "splits/*-19zl.csv"
LOCATION_LISTS = ("split_locations/all.csv", "split_locations/split/all.csv", "all.csv")
RULES = ImageRules(usual_sizes_px={"ground": ((224, 1232),), "aerial": ((750, 750),)})
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_LIST_ENDING = "-19zl.csv"


class CvusaSource:
    """The CVUSA layout, whose lists name an aerial tile, a panorama and an annotation that is not used."""

    looks_for = f"{SPLIT_LISTS} (here or in folders named {', '.join(FOLDERS)})"

    def detect(self, root: RawFolder) -> str | None:
        """Return the folder that holds `splits/`."""
        return next((base for base in BASES if _lists(root, base)), None)

    def near_miss(self, root: RawFolder) -> str:
        """Return what is there of a CVUSA whose split lists were not found."""
        if fnmatch.filter(root.names(), f"*{_LIST_ENDING}"):
            return "the split lists themselves are there; name the folder above as the root"
        for base in BASES:
            lists = join(base, "splits")
            if root.has(lists):
                found = some_names(root, lists)
                return f"{lists}/ is there but has no *{_LIST_ENDING} (it has {found})"
            for folder in ("bingmap", "streetview"):
                if root.has(join(base, folder)):
                    return f"{join(base, folder)}/ is there but no {SPLIT_LISTS} beside it"
        return ""

    def scan(self, base: str, *, root: RawFolder, split: str | None) -> SourceScan:
        """List the pairs of every split list, or of the list of `split` alone.

        Raises:
            DataError: There is no list of `split`.
        """
        splits = [name.removesuffix(_LIST_ENDING) for name in _lists(root, base)]
        if split is not None and split not in splits:
            raise DataError(f"{root.uri}: there is no list of the split {split!r}; there are {', '.join(splits)}")
        locations = _Locations.find(base, root)
        checker = RowChecker(root)
        for one in splits if split is None else [split]:
            _scan_list(one, base=base, root=root, locations=locations, checker=checker)
        return SourceScan(layout="cvusa", root=root, pairs=checker.pairs, problems=checker.problems, rules=RULES)


def _lists(root: RawFolder, base: str) -> list[str]:
    return fnmatch.filter(root.names(join(base, "splits")), f"*{_LIST_ENDING}")


def _scan_list(split: str, *, base: str, root: RawFolder, locations: _Locations, checker: RowChecker) -> None:
    name = split + _LIST_ENDING
    for number, cells in csv_rows(root, join(base, f"splits/{name}")):
        listed_in = f"{name}:{number}"
        if len(cells) < 2:
            if any(map(str.strip, cells)):
                why = f"one column, expected aerial,ground: {printable(cells[0])!r}"
                checker.note("bad_row", key=None, path=listed_in, detail=why)
            continue
        aerial, ground = cells[0].strip(), cells[1].strip()
        if not (aerial or ground):
            continue
        if number == 1 and not aerial.lower().endswith(_IMAGE_SUFFIXES):
            continue  # a header, where none belongs
        key = ground.rpartition("/")[2].rpartition(".")[0]
        location, trouble = locations.of(key)
        checker.add(
            Row(
                key=key,
                split=split,
                ground=join(base, ground),
                aerial=join(base, aerial),
                location=location,
                location_trouble=trouble,
                listed_in=listed_in,
            )
        )


class _Locations:
    """The rows of all.csv, or of no file at all."""

    def __init__(self, rows: list[str], name: str) -> None:
        self._rows = rows
        self._name = name

    @classmethod
    def find(cls, base: str, root: RawFolder) -> _Locations:
        """Look beside the split lists first and then in the folders above, up to the root."""
        folder = base
        while True:
            for candidate in LOCATION_LISTS:
                path = join(folder, candidate)
                if root.status(path) is not None:
                    rows = root.read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
                    rows = rows[:-1] if not rows[-1] else rows
                    has_header = bool(rows) and _numbers(rows[0]) is None
                    return cls(rows[has_header:], path.rpartition("/")[2])
            if not folder:
                return cls([], "")
            folder = folder.rpartition("/")[0]

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


def _numbers(row: str) -> list[float] | None:
    try:
        numbers = list(map(float, row.replace('"', "").split(",")))  # float takes white space away itself
    except ValueError:
        return None
    return numbers if len(numbers) == 5 and all(map(math.isfinite, numbers)) else None
