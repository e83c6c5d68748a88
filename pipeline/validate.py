"""Is this folder a dataset? Which layout, what is there, what is wrong with it and why that matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import xxhash

from pipeline.checks import load_pair
from pipeline.leaks import TRAITS, Repeat, Traits, find_repeats, make_traits
from pipeline.raw import RawFolder
from pipeline.schema import ROLES, TRAIN, PairSource
from pipeline.sources.base import Problem, SourceScan, count_kinds, count_splits, printable, unusable_summary
from pipeline.sources.detect import open_source

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Alike:
    """A pair that repeats another one.

    Attributes:
        kind: `leak_...` or `duplicate_...`, see `sources.kinds`.
        pair: The pair.
        other: What it repeats: a training pair if it leaks, else an earlier pair of its split.
    """

    kind: str
    pair: PairSource
    other: PairSource


@dataclass(frozen=True, kw_only=True)
class SplitLeaks:
    """What a split has in common with the training split and within itself.

    Attributes:
        num_pairs: Usable pairs of the split.
        num_leaked: Those that share a trait with a training pair.
        num_by_trait: The same by each trait that could be compared.
        num_twins: Pairs that share a trait with another pair of their own split.
    """

    num_pairs: int
    num_leaked: int
    num_by_trait: Mapping[str, int]
    num_twins: int


@dataclass(kw_only=True)
class ImageStatistics:
    """The image files of one view, each counted once.

    Attributes:
        num_files: Files of usable pairs.
        num_bytes: Their size together.
        sizes_px: How many have which height and width; empty if they were not opened.
    """

    num_files: int = 0
    num_bytes: int = 0
    sizes_px: Counter[tuple[int, int]] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """What `validate` found.

    Attributes:
        scan: What the layout's source listed.
        ok: Whether every listed pair can be used and there is at least one.
        summary: One line saying why `ok` is false; empty otherwise.
        pairs: Number of usable pairs in each split.
        images: The files of each view.
        problems: How often each kind of problem occurs.
        details: Every problem.
        alike: Every pair that repeats another one.
        train_split: What leaks are counted against.
        leaks: By split, the training split left out; None if there is no training split or nothing to compare by.
    """

    scan: SourceScan
    ok: bool
    summary: str
    pairs: Mapping[str, int]
    images: Mapping[str, ImageStatistics]
    problems: Mapping[str, int]
    details: Sequence[Problem]
    alike: Sequence[Alike]
    train_split: str
    leaks: Mapping[str, SplitLeaks] | None

    @property
    def layout(self) -> str:
        """Which layout it is."""
        return self.scan.layout


@dataclass(frozen=True, slots=True)
class _Checked:
    """What is kept of a pair after its images are forgotten, by role."""

    pair: PairSource
    problems: Sequence[Problem] = ()
    hashes: Mapping[str, bytes] = field(default_factory=dict)
    sizes_px: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def is_usable(self) -> bool:
        return not any(problem.is_unusable for problem in self.problems)


def validate(
    root: str | Path | RawFolder,
    *,
    layout: str = "auto",
    split: str | None = None,
    train_split: str = TRAIN,
    check_images: bool = True,
    num_threads: int = 4,
    progress: Progress | None = None,
) -> ValidationReport:
    """List the pairs under `root` and check them.

    Args:
        root: Folder of the dataset, or a table of pairs; a local path or an `s3://` URI.
        layout: `auto` or the layout it must be.
        split: See `open_source`.
        train_split: What leaks are counted against.
        check_images: Also read, hash and decode every image (at an eighth of its size); otherwise only the files'
            presence is checked, and pairs are compared by their places alone.
        num_threads: Images are read and decoded in this many threads.
        progress: Called with the number of pairs checked and of all pairs.

    Raises:
        DataError: The folder is of no known layout.
        StoreError: The object store cannot be read.
    """
    scan = open_source(root, layout=layout, split=split)
    problems = list(scan.problems)
    usable = []
    for number, checked in enumerate(_check_all(scan, check_images=check_images, num_threads=num_threads), start=1):
        problems.extend(checked.problems)
        if checked.is_usable:
            usable.append(checked)
        if progress is not None:
            progress(number, len(scan.pairs))
    pairs = [checked.pair for checked in usable]
    traits = _traits(usable)
    repeats = list(find_repeats(traits, [pair.split for pair in pairs], train_split=train_split))
    alike = [Alike(kind=_kind(repeat), pair=pairs[repeat.row], other=pairs[repeat.other]) for repeat in repeats]
    problems.extend(map(_alike_problem, alike))
    summary = unusable_summary(problems, num_usable=len(pairs))
    return ValidationReport(
        scan=scan,
        ok=not summary,
        summary=summary,
        pairs=count_splits(pairs),
        images=_statistics(usable),
        problems=count_kinds(problems),
        details=problems,
        alike=alike,
        train_split=train_split,
        leaks=_leaks(pairs, repeats, train_split=train_split, compared=_compared(usable)),
    )


def _check_all(scan: SourceScan, *, check_images: bool, num_threads: int) -> Iterator[_Checked]:
    """Check pair after pair in threads, in order, never holding more than a window of them."""
    if not check_images:
        yield from map(_Checked, scan.pairs)
        return

    def check(pair: PairSource) -> _Checked:
        images, problems = load_pair(pair, scan.root, rules=scan.rules, check_images=True)
        hashes = {role: xxhash.xxh3_128_digest(image.data) for role, image in images.items()}
        sizes = {role: (image.info.height_px, image.info.width_px) for role, image in images.items()}
        return _Checked(pair, problems, hashes, sizes)

    with ThreadPoolExecutor(num_threads) as pool:
        remaining = iter(scan.pairs)
        while window := list(islice(remaining, 64 * num_threads)):
            yield from pool.map(check, window)


def _traits(usable: Sequence[_Checked]) -> Traits:
    places = []
    for checked in usable:
        place = checked.pair.location
        places.append((place.latitude_deg, place.longitude_deg, place.heading_deg) if place else None)
    return make_traits(
        ground=[checked.hashes.get("ground") for checked in usable],
        aerial=[checked.hashes.get("aerial") for checked in usable],
        location_ids=[checked.pair.location_id for checked in usable],
        places=places,
    )


def _compared(usable: Iterable[_Checked]) -> list[str]:
    """Return the traits that are known of any pair."""
    known: set[str] = set()
    for checked in usable:
        known.update(f"{role}_bytes" for role in checked.hashes)
        known.update({"position_and_heading"} if checked.pair.location else ())
    return [trait for trait in TRAITS if trait in known]


def _leaks(
    pairs: Sequence[PairSource], repeats: Sequence[Repeat], *, train_split: str, compared: Sequence[str]
) -> dict[str, SplitLeaks] | None:
    counts = count_splits(pairs)
    if train_split not in counts or not compared:
        return None
    leaked = {(pairs[repeat.row].split, repeat.trait, repeat.row) for repeat in repeats if repeat.is_leak}
    twins = {(pairs[row].split, row) for repeat in repeats if not repeat.is_leak for row in (repeat.row, repeat.other)}
    return {
        split: SplitLeaks(
            num_pairs=num_pairs,
            num_leaked=len({row for name, _, row in leaked if name == split}),
            num_by_trait={trait: sum(name == split and by == trait for name, by, _ in leaked) for trait in compared},
            num_twins=sum(name == split for name, _ in twins),
        )
        for split, num_pairs in counts.items()
        if split != train_split
    }


def _statistics(usable: Sequence[_Checked]) -> dict[str, ImageStatistics]:
    statistics = {}
    for role in ROLES:
        found, seen = ImageStatistics(), set()
        for checked in usable:
            path = getattr(checked.pair, role)
            if path not in seen:  # VIGOR's pairs share their aerial images
                seen.add(path)
                found.num_files += 1
                found.num_bytes += getattr(checked.pair, f"{role}_status").num_bytes
                found.sizes_px.update([checked.sizes_px[role]] if role in checked.sizes_px else [])
        statistics[role] = found
    return statistics


def _kind(repeat: Repeat) -> str:
    return f"{'leak' if repeat.is_leak else 'duplicate'}_{repeat.trait}"


def _alike_problem(alike: Alike) -> Problem:
    pair, other = alike.pair, alike.other
    path, others = (pair.aerial, other.aerial) if "aerial" in alike.kind else (pair.ground, other.ground)
    shared = "position and heading" if "position" in alike.kind else "bytes"
    detail = f"same {shared} as {printable(others)}, pair {other.key} of {other.split}"
    return Problem(kind=alike.kind, key=pair.key, path=printable(path), detail=detail)
