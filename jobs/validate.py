"""Say what a folder of pairs holds and what is wrong with it.

python -m jobs.validate --root CVUSA
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import Any

from jobs import entry
from pipeline import validate

LAYOUTS = ("auto", "cvusa", "cvact", "vigor", "table")
_NUM_EXAMPLES = 3


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the raw pairs lie."""
    parser.add_argument(
        "--root", required=True, help="folder or s3://bucket/prefix of the data set, or a CSV or Parquet table"
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="auto", help="what it must be; auto finds out")
    parser.add_argument(
        "--split",
        help="the one split to use (VIGOR: also cross-area); of a table without a split column its name (default: val)",
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    parser.add_argument("--no-images", action="store_true", help="check only that the files are there, open none")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    report = validate.validate(
        arguments.root,
        layout=arguments.layout,
        split=arguments.split,
        check_images=not arguments.no_images,
        progress=entry.Progress("checking"),
    )
    shown: Counter[str] = Counter()
    for problem in report.details:
        shown[problem.kind] += 1
        if shown[problem.kind] <= _NUM_EXAMPLES:
            entry.LOGGER.info("%s", problem)
    for kind, count in report.problems.items():
        if count > _NUM_EXAMPLES:
            entry.LOGGER.info("... and %d more of kind %s", count - _NUM_EXAMPLES, kind)
    result = {
        "layout": report.layout,
        "ok": report.ok,
        "pairs": dict(report.pairs),
        "problems": dict(report.problems),
    }
    if not report.ok:
        raise entry.FailedResultError(report.summary, result=result)
    return result


JOB = entry.Job(
    name="validate",
    summary="Say what a folder of pairs holds, which layout it is, and what is wrong with it; exit code 2 if unusable.",
    example="cvft validate --root demo/town",
    add_arguments=_add_arguments,
    run=_run,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
