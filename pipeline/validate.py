"""Is this folder a dataset? Which layout, which pairs, what is wrong with it, by kind and by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipeline.checks import load_pair
from pipeline.raw import RawFolder
from pipeline.schema import PairSource
from pipeline.sources.base import Problem, SourceScan, count_kinds, count_splits, unusable_summary
from pipeline.sources.detect import open_source


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """What `validate` found.

    Attributes:
        layout: Which layout it is.
        ok: Whether every listed pair can be used and there is at least one.
        pairs: Number of usable pairs in each split.
        problems: How often each kind of problem occurs.
        details: Every problem.
        summary: One line saying why `ok` is false; empty otherwise.
    """

    layout: str
    ok: bool
    pairs: Mapping[str, int]
    problems: Mapping[str, int]
    details: Sequence[Problem]
    summary: str


def validate(
    root: str | Path | RawFolder,
    *,
    layout: str = "auto",
    split: str | None = None,
    check_images: bool = True,
    num_threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> ValidationReport:
    """List the pairs under `root` and check them.

    Args:
        root: Folder of the dataset, or a table of pairs; a local path or an `s3://` URI.
        layout: `auto` or the layout it must be.
        split: See `open_source`.
        check_images: Also decode every image (at an eighth of its size); otherwise only the files' presence is checked.
        num_threads: Images are read and decoded in this many threads.
        progress: Called with the number of pairs checked and of all pairs.

    Raises:
        DataError: The folder is of no known layout.
        StoreError: The object store cannot be read.
    """
    scan = open_source(root, layout=layout, split=split)
    problems = list(scan.problems)
    pairs = list(scan.pairs)
    if check_images:
        pairs = []
        for number, (pair, found) in enumerate(_check_all(scan, num_threads), start=1):
            problems.extend(found)
            if not any(problem.is_unusable for problem in found):
                pairs.append(pair)
            if progress is not None:
                progress(number, len(scan.pairs))
    summary = unusable_summary(problems, num_usable=len(pairs))
    return ValidationReport(
        layout=scan.layout,
        ok=not summary,
        pairs=count_splits(pairs),
        problems=count_kinds(problems),
        details=problems,
        summary=summary,
    )


def _check_all(scan: SourceScan, num_threads: int) -> Iterator[tuple[PairSource, list[Problem]]]:
    """Check pair after pair in threads, in order, never holding more than a window of them."""

    def check(pair: PairSource) -> tuple[PairSource, list[Problem]]:
        return pair, load_pair(pair, scan.root, rules=scan.rules, check_images=True)[1]

    with ThreadPoolExecutor(num_threads) as pool:
        remaining = iter(scan.pairs)
        while window := list(islice(remaining, 64 * num_threads)):
            yield from pool.map(check, window)
