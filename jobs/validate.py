"""Say what a folder of pairs holds, what is wrong with it, why that matters and what to do.

python -m jobs.validate --root CVUSA --html report --fix-list exclude.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cvft.configuration import require
from jobs import entry
from pipeline.report.validation import build_validation_page
from pipeline.report.validation_text import validation_text
from pipeline.sources.base import Problem
from pipeline.sources.kinds import KINDS
from pipeline.validate import ValidationReport, validate

LAYOUTS = ("auto", "cvusa", "cvact", "vigor", "table")
_FIX_LIST_HEADER = "# Pairs to leave out: cvft shard --root ROOT --store STORE --exclude THIS_FILE\n"


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
    parser.add_argument("--train-split", default="train", help="split that leaks are counted against (default: train)")
    parser.add_argument("--threads", type=int, default=4, help="threads that read and decode images (default: 4)")
    for option, what in (
        ("--json", "write the result with every problem"),
        ("--html", "write a page with pictures of the offenders; into a folder if it does not end in .html"),
        ("--fix-list", "write unusable pairs' keys, for shard --exclude"),
    ):
        parser.add_argument(option, type=entry.local_path, metavar="FILE", help=what)
    parser.add_argument("--fix-leaks", action="store_true", help="put pairs that leak into training on it as well")


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    require(arguments.threads >= 1, f"--threads {arguments.threads}: at least 1")
    require(bool(arguments.fix_list) or not arguments.fix_leaks, "--fix-leaks: also name the list with --fix-list FILE")
    return entry.plain(arguments)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    _resolve(arguments)
    report = validate(
        arguments.root,
        layout=arguments.layout,
        split=arguments.split,
        train_split=arguments.train_split,
        check_images=not arguments.no_images,
        num_threads=arguments.threads,
        progress=entry.Progress("checking"),
    )
    entry.LOGGER.info("\n\n%s\n", validation_text(report))
    result = summarise(report)
    if arguments.json:
        _write(arguments.json, json.dumps({**result, "details": [asdict(one) for one in report.details]}, indent=1))
        result["json"] = str(arguments.json.absolute())
    if arguments.html:
        result["html"] = str(build_validation_page(arguments.html, report).absolute())
    if arguments.fix_list:
        text, result["fix_list_pairs"] = fix_list(report, with_leaks=arguments.fix_leaks)
        _write(arguments.fix_list, text)
        result["fix_list"] = str(arguments.fix_list.absolute())
    if not report.ok:
        raise entry.FailedResultError(report.summary, result=result)
    return result


def summarise(report: ValidationReport) -> dict[str, Any]:
    """Return the report as plain JSON data, without the single problems."""
    first: dict[str, Problem] = {}
    for problem in report.details:
        first.setdefault(problem.kind, problem)
    return {
        "root": report.scan.root.uri,
        "layout": report.layout,
        "base": report.scan.base,
        "ok": report.ok,
        "summary": report.summary,
        "pairs": dict(report.pairs),
        "problems": dict(report.problems),
        "kinds": {
            kind: {**asdict(KINDS[kind]), "count": count, "first": str(first[kind])}
            for kind, count in report.problems.items()
        },
        "images": {
            role: {
                "files": images.num_files,
                "bytes": images.num_bytes,
                "sizes_px": {f"{width}x{height}": n for (height, width), n in images.sizes_px.most_common()},
            }
            for role, images in report.images.items()
        },
        "train_split": report.train_split,
        "leaks": None if report.leaks is None else {split: asdict(one) for split, one in report.leaks.items()},
    }


def fix_list(report: ValidationReport, *, with_leaks: bool) -> tuple[str, int]:
    """Return the list that `shard --exclude` takes, each key with its first problem, and how many keys it holds.

    A row that names no pair cannot be excluded by a key and stands in a comment.
    """
    lines: dict[str, str] = {}
    comments = []
    for problem in report.details:
        if problem.is_unusable or (with_leaks and problem.kind.startswith("leak_")):
            why = " ".join(f"{problem.kind}: {problem.detail}".split())
            if problem.key is None:
                comments.append(f"# no key, mend the list: {problem.path}: {why}\n")
            else:
                lines.setdefault(problem.key, f"{problem.key}  # {why}\n")
    return "".join([_FIX_LIST_HEADER, *comments, *lines.values()]), len(lines)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


JOB = entry.Job(
    name="validate",
    summary="Say what a folder of pairs holds, what is wrong with it and what to do; exit code 2 if it is unusable.",
    example="cvft validate --root demo/town --html demo/validation.html",
    add_arguments=_add_arguments,
    run=_run,
    resolve=_resolve,
    state="the folder",
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
