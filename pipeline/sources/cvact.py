"""CVACT as users have it on disk: a list in MATLAB's format and a folder of images for each half.

ACT_data.mat      ids, UTM positions (zone 55 south) and the splits' index lists; see `matlab`
ANU_data_small/   train (trainSet) and val (valSet)
ANU_data_test/    test (valSetAll)
  streetview/<id>_grdView.jpg                1664x832, of which rows 208 to 624 are used; prepared sets: .png, 616x112
  satview_polish/<id>_satView_polish.jpg     1200x1200; prepared sets: .png, 256x256

valSetAll names the 8,884 ids of val once more: the key of a test pair is `test-<id>`, its location_id the id. An absent
half is told and the other one used. The lists name more ids than the archives hold: each of those is a `missing_*`
problem, which `--skip-unusable` leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cvft.errors import DataError
from pipeline.geography import from_utm
from pipeline.raw import RawFolder
from pipeline.schema import TEST, TRAIN, VAL, ImageRules, Location
from pipeline.sources.base import Row, RowChecker, SourceScan, join, nestings
from pipeline.sources.matlab import ActData, read_act_data
from pipeline.sources.matlab_reader import INDEX_FIELDS

BASES = nestings("CVACT", "dataset", "data")
LIST = "ACT_data.mat"
SMALL, LARGE = "ANU_data_small", "ANU_data_test"
HALVES = {TRAIN: SMALL, VAL: SMALL, TEST: LARGE}
GROUND_FOLDERS = ("streetview", "streetview_processed", "streetview_polish")
AERIAL_FOLDER = "satview_polish"
GROUND_ENDING, AERIAL_ENDING = "_grdView", "_satView_polish"
UTM_EPSG = 32755  # WGS84 / UTM zone 55 south: Canberra
_EASTING_M, _NORTHING_M = (100_000, 900_000), (1_100_000, 10_000_000)  # what a zone's coordinates can be
RULES = ImageRules(
    usual_sizes_px={"ground": ((832, 1664), (112, 616)), "aerial": ((1200, 1200), (256, 256))},
    ground_rows_px={(832, 1664): (208, 624)},
)
_LIST_FOLDERS = ("", SMALL, LARGE, "CVACT_orientations")
_SUFFIXES = (".jpg", ".jpeg", ".png")
_MISSING_HINT = "; normal in CVACT, whose lists name more ids than its archives hold"


class CvactSource:
    """The CVACT layout; one half is enough, and a half may be the root itself."""

    looks_for = f"{LIST} and {SMALL}/ or {LARGE}/ with {GROUND_FOLDERS[0]}/ and {AERIAL_FOLDER}/"

    def detect(self, root: RawFolder) -> str | None:
        """Return the folder that holds a half's images, or at least the list."""
        with_images = (base for base in BASES if _halves(root, base))
        with_list = (base for base in BASES if root.status(join(base, LIST)) is not None)
        return next(with_images, next(with_list, None))

    def near_miss(self, root: RawFolder) -> str:
        """Return what is there of a CVACT that was not detected."""
        for base in BASES:
            for half in (SMALL, LARGE):
                if root.has(join(base, half)):
                    return f"{join(base, half)}/ is there but has no {AERIAL_FOLDER}/, and there is no {LIST}"
        return ""

    def scan(self, base: str, *, root: RawFolder, split: str | None) -> SourceScan:
        """List the pairs of all splits, or of `split` alone.

        Raises:
            DataError: The list is missing or damaged, no half is there, or not the one that `split` needs.
        """
        halves = _halves(root, base)
        data, name = _read_list(root, base)
        wanted = _wanted(root, halves, data, split=split)
        checker = RowChecker(root, missing_hint=_MISSING_HINT, is_suffix_sure=True)
        _note_absent(checker, halves, data, split=split)
        locations = _Locations(data.utm_m)
        files = {half: _HalfFiles(root, folder) for half, folder in halves.items()}
        for one in wanted:
            for row in _rows(one, data, files=files[HALVES[one]], locations=locations, name=name, checker=checker):
                checker.add(row)
        for half in files.values():
            half.note_rest(checker, are_all_listed=split is None)
        return SourceScan(layout="cvact", root=root, pairs=checker.pairs, problems=checker.problems, rules=RULES)


def _halves(root: RawFolder, base: str) -> dict[str, str]:
    """Return the folder of each half that is there."""
    found = {half: join(base, half) for half in (SMALL, LARGE) if root.has(join(base, f"{half}/{AERIAL_FOLDER}"))}
    if not found and root.has(join(base, AERIAL_FOLDER)):
        own_name = (base or root.uri).rpartition("/")[2]
        return {LARGE if own_name == LARGE else SMALL: base}
    return found


def _read_list(root: RawFolder, base: str) -> tuple[ActData, str]:
    above = [base.rpartition("/")[0], "", ".."]  # ".." is for a root that is a half itself
    for folder in dict.fromkeys([*(join(base, name) if name else base for name in _LIST_FOLDERS), *above]):
        path = join(folder, LIST)
        if root.status(path) is not None:
            return read_act_data(root.read_bytes(path), name=f"{root.uri}/{path}"), path.rpartition("/")[2]
    raise DataError(f"{root.uri}: {LIST} is missing; it comes with CVACT and names its ids, splits and positions")


def _wanted(root: RawFolder, halves: dict[str, str], data: ActData, *, split: str | None) -> list[str]:
    """Return the splits that are to be listed and whose half is there."""
    if split is not None and split not in HALVES:
        raise DataError(f"{root.uri}: CVACT has no split {split!r}; it has {', '.join(HALVES)}")
    if not halves:
        raise DataError(f"{root.uri}: {LIST} is there, but neither {SMALL}/{AERIAL_FOLDER} nor {LARGE}/{AERIAL_FOLDER}")
    if split is not None and (HALVES[split] not in halves or split not in data.indices):
        what = f"{HALVES[split]}/" if HALVES[split] not in halves else f"{INDEX_FIELDS[split][0]} in {LIST}"
        raise DataError(f"{root.uri}: split {split} needs {what}, which is not there")
    return [one for one in HALVES if split in (None, one) and HALVES[one] in halves and one in data.indices]


def _note_absent(checker: RowChecker, halves: dict[str, str], data: ActData, *, split: str | None) -> None:
    for one, half in HALVES.items():
        if split is None and half not in halves:
            num_ids = len(data.indices.get(one, ()))
            checker.note(
                "absent_split", key=None, path=half, detail=f"no such folder: {one} ({num_ids} ids) is left out"
            )
        elif split is None and one not in data.indices:
            checker.note("absent_split", key=None, path=LIST, detail=f"no {INDEX_FIELDS[one][0]}: {one} is left out")


class _HalfFiles:
    """The image files of one half, by id: whatever the suffix, .jpg before .png where there are both."""

    def __init__(self, root: RawFolder, folder: str) -> None:
        names = (name for name in GROUND_FOLDERS if root.has(join(folder, name)))
        self._folders = {
            GROUND_ENDING: join(folder, next(names, GROUND_FOLDERS[0])),
            AERIAL_ENDING: join(folder, AERIAL_FOLDER),
        }
        self._names: dict[str, dict[str, str]] = {ending: {} for ending in self._folders}
        self._second: list[tuple[str, str]] = []
        self._listed: set[str] = set()
        for ending, place in self._folders.items():
            for name in root.names(place):
                stem, dot, suffix = name.rpartition(".")
                if stem.endswith(ending) and (dot + suffix).lower() in _SUFFIXES:
                    first = self._names[ending].setdefault(stem.removesuffix(ending), name)
                    if first != name:
                        self._second.append((join(place, name), first))

    def paths(self, pano_id: str) -> tuple[str, str]:
        """Return the ground and the aerial file of an id, there or not."""
        self._listed.add(pano_id)
        ground, aerial = (
            f"{place}/{self._names[ending].get(pano_id, f'{pano_id}{ending}.jpg')}"
            for ending, place in self._folders.items()
        )
        return ground, aerial

    def note_rest(self, checker: RowChecker, *, are_all_listed: bool) -> None:
        """Note files that were not used: of an id with two, and of ids that no list names."""
        for path, first in self._second:
            checker.note("second_file", key=None, path=path, detail=f"{first} of the same id is used")
        for ending, place in self._folders.items() if are_all_listed else ():
            for pano_id, name in self._names[ending].items():
                if pano_id not in self._listed:
                    checker.note("unlisted_file", key=None, path=f"{place}/{name}", detail=f"its id is not in {LIST}")


class _Locations:
    """The positions of all ids, in UTM as given and in degrees."""

    def __init__(self, utm_m: npt.NDArray[np.float64]) -> None:
        east, north = utm_m.T
        is_in_zone = (east >= _EASTING_M[0]) & (east <= _EASTING_M[1])
        is_in_zone &= (north >= _NORTHING_M[0]) & (north <= _NORTHING_M[1])
        degrees = from_utm(*np.where(is_in_zone, utm_m.T, np.nan), epsg=UTM_EPSG)
        self._rows = np.column_stack([degrees, utm_m])
        self._is_known = is_in_zone

    def of(self, row: int) -> Location | None:
        if not self._is_known[row]:
            return None
        latitude_deg, longitude_deg, easting_m, northing_m = self._rows[row].tolist()
        return Location(
            latitude_deg=latitude_deg, longitude_deg=longitude_deg, easting_m=easting_m, northing_m=northing_m
        )


def _rows(
    split: str, data: ActData, *, files: _HalfFiles, locations: _Locations, name: str, checker: RowChecker
) -> Iterator[Row]:
    field = ".".join(INDEX_FIELDS[split])
    for number, index in enumerate(data.indices[split].tolist(), start=1):
        listed_in = f"{name}:{field}:{number}"
        if not (1 <= index <= len(data.pano_ids) and index == int(index)):
            detail = f"index {index:g} is none of 1 to {len(data.pano_ids)}"
            checker.note("bad_row", key=None, path=listed_in, detail=detail)
            continue
        row = int(index) - 1
        pano_id = data.pano_ids[row]
        ground, aerial = files.paths(pano_id)
        yield Row(
            key=f"{split}-{pano_id}" if split == TEST and pano_id else pano_id,
            split=split,
            ground=ground,
            aerial=aerial,
            location=locations.of(row),
            location_trouble=f"utm of id {row + 1} is no position in zone 55 south",
            listed_in=listed_in,
            location_id=pano_id,
        )
