"""From a folder to its pairs: the layouts we know, and which of them a folder is."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cvft.errors import DataError
from pipeline.raw import RawFolder
from pipeline.sources.base import Source, SourceScan, printable, some_names
from pipeline.sources.cvact import CvactSource
from pipeline.sources.cvusa import CvusaSource
from pipeline.sources.table import TableSource
from pipeline.sources.vigor import VigorSource

SOURCES: dict[str, Source] = {
    "cvusa": CvusaSource(),
    "cvact": CvactSource(),
    "vigor": VigorSource(),
    "table": TableSource(),
}


TABLE_SUFFIXES = (".csv", ".parquet")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")


def open_source(root: str | Path | RawFolder, *, layout: str = "auto", split: str | None = None) -> SourceScan:
    """List the pairs under `root`, without opening any image.

    Args:
        root: Folder of the dataset (or the table file), a local path or an `s3://` URI.
        layout: One of `SOURCES`, or `auto` to find out.
        split: Name of the split for a table that has no split column; for other layouts, the one split to list (VIGOR
            also knows `cross-area`, its other protocol).

    Raises:
        DataError: There is no such folder, it is of no known layout, of several, or of another than told.
        StoreError: The object store cannot be read.
    """
    if layout != "auto" and layout not in SOURCES:
        raise DataError(f"layout {layout!r} is unknown; use auto, {', '.join(SOURCES)}")
    folder, table = _folder_and_table(root)
    if not folder.has(table):
        raise DataError(f"{root}: there is no such folder or table")
    wanted = SOURCES if layout == "auto" else {layout: SOURCES[layout]}
    if table:
        return _scan_table(folder, table, wanted=wanted, split=split)
    found = {name: base for name, source in wanted.items() if (base := source.detect(folder)) is not None}
    if not found:
        raise DataError(
            f"{root}: no known layout{_packed(folder)}; looked for {_near_misses(folder, wanted)}; "
            f"found: {some_names(folder)}"
        )
    if len(found) > 1:
        raise DataError(f"{root}: looks like {' and '.join(found)}; say which with --layout")
    ((name, base),) = found.items()
    return _scan(name, base, root=folder, split=split)


def _scan(name: str, base: str, *, root: RawFolder, split: str | None) -> SourceScan:
    """Scan with the garbage collector at rest: it would look a million new objects over again and again, all in use."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return replace(SOURCES[name].scan(base, root=root, split=split), base=base)
    finally:
        if was_enabled:
            gc.enable()


def _folder_and_table(root: str | Path | RawFolder) -> tuple[RawFolder, str]:
    """Return the dataset's folder and the table's name in it, which is empty if `root` is a folder."""
    folder = RawFolder.from_uri(root)
    if not folder.uri.endswith(TABLE_SUFFIXES) or folder.names():
        return folder, ""
    parent, _, name = folder.uri.rpartition("/")
    return RawFolder.from_uri(parent), name


def _scan_table(folder: RawFolder, table: str, *, wanted: Mapping[str, Source], split: str | None) -> SourceScan:
    if "table" not in wanted:
        raise DataError(f"{folder.uri}/{table}: is a table, which the layout {', '.join(wanted)} is not")
    return _scan("table", table, root=folder, split=split)


def _packed(root: RawFolder) -> str:
    """Return a hint if the data seem not to be unpacked yet."""
    archive = next((name for name in root.names() if name.lower().endswith(_ARCHIVES)), None)
    return f" (but {printable(archive)}: unpack it first)" if archive else ""


def _near_misses(root: RawFolder, wanted: Mapping[str, Source]) -> str:
    """Return what each layout is known by and, where something of it is there, what."""
    parts = []
    for name, source in wanted.items():
        near = source.near_miss(root)
        parts.append(f"{name}: {source.looks_for}" + (f" ({near})" if near else ""))
    return "; ".join(parts)
