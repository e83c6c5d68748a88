"""One's own pairs as a plain table, CSV or Parquet.

Columns: `key`, `ground`, `aerial` (files, relative to the table's folder) and, where known, `latitude`, `longitude`,
`heading_deg` (WGS84 degrees; compass heading of the panorama's centre) and `split`. Without a split column every pair
is in `val`, or in the split asked for.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping

import pyarrow as pa

from cvft.errors import DataError
from pipeline.parquet import read_parquet
from pipeline.raw import RawFolder
from pipeline.schema import VAL, Location
from pipeline.sources.base import Row, RowChecker, SourceScan, csv_rows, printable

NAMES = ("pairs.csv", "pairs.parquet")
REQUIRED = ("key", "ground", "aerial")
OPTIONAL = ("latitude", "longitude", "heading_deg", "split")


class TableSource:
    """A table of pairs; the root is the folder that holds it or the table file itself."""

    looks_for = " or ".join(NAMES)

    def detect(self, root: RawFolder) -> str | None:
        """Return the table file."""
        return next((name for name in NAMES if root.status(name) is not None), None)

    def near_miss(self, root: RawFolder) -> str:
        """Return a table of another name."""
        other = next((name for name in root.names() if name.lower().endswith((".csv", ".parquet"))), None)
        return f"{printable(other)} is there; if it is a table of pairs, name it as the root" if other else ""

    def scan(self, base: str, *, root: RawFolder, split: str | None) -> SourceScan:
        """List the table's pairs; `split` names the split of a table without that column."""
        checker = RowChecker(root)
        columns, rows = _read(root, base)
        _check_columns(base, columns, split=split, root=root, checker=checker)
        for number, cells in rows:
            listed_in = f"{base}:{number}"
            absent = [name for name in (*REQUIRED, *({"split"} & set(columns))) if not cells.get(name)]
            if absent:
                checker.note("bad_row", key=cells.get("key"), path=listed_in, detail=f"no {', '.join(absent)}")
                continue
            location, trouble = _location(cells)
            checker.add(
                Row(
                    key=cells["key"],
                    split=cells.get("split") or split or VAL,
                    ground=cells["ground"],
                    aerial=cells["aerial"],
                    location=location,
                    location_trouble=trouble,
                    listed_in=listed_in,
                )
            )
        return SourceScan(layout="table", root=root, pairs=checker.pairs, problems=checker.problems)


def _read(root: RawFolder, name: str) -> tuple[list[str], Iterator[tuple[int, Mapping[str, str]]]]:
    """Return the columns and the numbered rows, every value as text and blank rows left out."""
    if name.endswith(".parquet"):
        try:
            table = read_parquet(root.read_bytes(name))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{root.uri}/{name}: cannot be read as Parquet: {' '.join(str(error).split())}") from None
        return table.column_names, enumerate(map(_as_text, table.to_pylist()), start=1)
    lines = csv_rows(root, name)
    _, header = next(lines, (0, []))
    columns = [cell.strip() for cell in header]
    return columns, (
        (number, dict(zip(columns, (cell.strip() for cell in cells), strict=False)))
        for number, cells in lines
        if any(cell.strip() for cell in cells)
    )


def _as_text(row: Mapping[str, object]) -> Mapping[str, str]:
    return {name: "" if value is None else str(value) for name, value in row.items()}


def _check_columns(path: str, columns: list[str], *, split: str | None, root: RawFolder, checker: RowChecker) -> None:
    absent = [name for name in REQUIRED if name not in columns]
    if absent:
        raise DataError(
            f"{root.uri}/{path}: no column {', '.join(absent)}; a table of pairs has {', '.join(REQUIRED)} "
            f"(it has {columns})"
        )
    twice = [name for name in REQUIRED + OPTIONAL if columns.count(name) > 1]
    if twice:
        raise DataError(f"{root.uri}/{path}: has column {twice[0]} more than once; remove one")
    if split is not None and "split" in columns:
        raise DataError(f"{root.uri}/{path}: has a split column, so split={split} cannot be given as well")
    for name in columns:
        if name not in REQUIRED + OPTIONAL:
            near = difflib.get_close_matches(name, OPTIONAL, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            checker.note("unknown_column", key=None, path=path, detail=f"column {name!r} is not read{hint}")


def _location(cells: Mapping[str, str]) -> tuple[Location | None, str]:
    latitude, longitude, heading = (cells.get(name) or "" for name in ("latitude", "longitude", "heading_deg"))
    if not latitude or not longitude:
        return None, "no latitude and longitude"
    try:
        location = Location(
            latitude_deg=float(latitude),
            longitude_deg=float(longitude),
            heading_deg=float(heading) if heading else None,
        )
    except ValueError:
        return None, f"latitude {latitude!r}, longitude {longitude!r}, heading_deg {heading!r} are not numbers"
    if not math.isfinite(location.heading_deg or 0.0):
        return None, f"heading_deg {heading} is not finite"
    if not (abs(location.latitude_deg) <= 90 and abs(location.longitude_deg) <= 180):
        return None, f"latitude {latitude}, longitude {longitude} are not on Earth"
    return location, ""
