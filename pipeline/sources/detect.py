"""From a folder to its pairs: the layouts we know, and which of them a folder is."""

from __future__ import annotations

from pathlib import Path

from cvft.errors import DataError
from pipeline.sources.base import Source, SourceScan
from pipeline.sources.cvact import CvactSource
from pipeline.sources.cvusa import CvusaSource
from pipeline.sources.table import TableSource

SOURCES: dict[str, Source] = {"cvusa": CvusaSource(), "cvact": CvactSource(), "table": TableSource()}


def open_source(root: Path, *, layout: str = "auto", split: str | None = None) -> SourceScan:
    """List the pairs under `root`, without opening any image.

    Args:
        root: Folder of the dataset (or the table file).
        layout: One of `SOURCES`, or `auto` to find out.
        split: Name of the split for a table that has no split column; for other layouts, the one split to list.

    Raises:
        DataError: There is no such folder, it is of no known layout, of several, or of another than told.
    """
    if not root.exists():
        raise DataError(f"{root}: there is no such folder or table")
    if layout != "auto" and layout not in SOURCES:
        raise DataError(f"layout {layout!r} is unknown; use auto, {', '.join(SOURCES)}")
    wanted = SOURCES if layout == "auto" else {layout: SOURCES[layout]}
    found = {name: base for name, source in wanted.items() if (base := source.detect(root)) is not None}
    if not found:
        kinds = "; ".join(f"{name}: {source.looks_for}" for name, source in wanted.items())
        raise DataError(f"{root}: no known layout; looked for {kinds}; found: {_contents(root)}")
    if len(found) > 1:
        raise DataError(f"{root}: looks like {' and '.join(found)}; say which with --layout")
    ((name, base),) = found.items()
    return SOURCES[name].scan(base, root=root, split=split)


def _contents(root: Path, limit: int = 8) -> str:
    if root.is_file():
        return root.name
    names = sorted(path.name for path in root.iterdir())
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + rest
