"""Show a dataset of shards: its numbers, and its first pairs as a contact sheet.

python -m jobs.inspect --manifest shards --out sheet.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cvft.errors import ConfigError
from jobs import entry
from pipeline.inspection import draw_sheet, statistics_table, write_page
from pipeline.manifest import Manifest
from pipeline.manifest_statistics import manifest_statistics

_SUFFIXES = (".png", ".html")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--manifest", required=True, help="the store, or one of its manifests")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shard", help="whose pairs to show: its path, or the end of it (default: the first shard)")
    which.add_argument("--split", help="whose pairs to show")
    parser.add_argument("--num", type=int, default=12, help="pairs to show (default: 12)")
    parser.add_argument(
        "--out", type=entry.local_path, help="the contact sheet: a .png, or a .html page with the numbers as well"
    )


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    out: Path | None = arguments.out
    if out is not None and out.suffix not in _SUFFIXES:
        raise ConfigError(f"--out {out}: must end with one of {', '.join(_SUFFIXES)}")
    for name in ("shard", "split"):
        if out is None and getattr(arguments, name) is not None:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: says what --out shows; add --out sheet.html")
    return entry.plain(arguments)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    _resolve(arguments)
    out: Path | None = arguments.out
    manifest = Manifest.load(arguments.manifest)
    statistics = manifest_statistics(manifest)
    _tell(statistics)
    if out is not None:
        sheet = draw_sheet(manifest, shard=arguments.shard, split=arguments.split, num=arguments.num)
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".html":
            write_page(statistics, sheet, out)
        else:
            sheet.save(out)
    return {**statistics, "out": None if out is None else str(out.absolute())}


def _tell(statistics: dict[str, Any]) -> None:
    """Print the numbers as a table."""
    table = statistics_table(statistics)
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stderr.write("  ".join(cells).rstrip() + "\n")


JOB = entry.Job(
    name="inspect",
    summary="Show a dataset of shards: its numbers, and its first pairs as a contact sheet.",
    example="cvft inspect --manifest demo/shards --out sheet.html",
    add_arguments=_add_arguments,
    run=_run,
    resolve=_resolve,
    state="the store",
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
