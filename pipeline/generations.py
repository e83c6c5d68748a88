"""What has changed between a manifest and the raw data: pairs kept, changed, dropped, new.

A pair is unchanged if what is known of it is what the manifest says and its two files' sizes and stamps (time of change
or ETag) are those of the run that read them last. Stamps lie beside the manifest and never in it: where they differ or
are lost (a copied folder has other times), the files are read and their hashes decide.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.checks import load_pair
from pipeline.manifest import Manifest
from pipeline.parquet import read_parquet
from pipeline.profile import ORIGINAL
from pipeline.raw import RawFolder
from pipeline.schema import ROLES, ImageRules, PairSource
from pipeline.shards import FACTS, original_hashes, pair_facts
from pipeline.sources.base import Problem, SourceScan
from pipeline.storage import Store

_LOGGER = logging.getLogger(__name__)
_PAIRS_PER_TASK = 1000
_ROWS = ("ground_first_row_px", "ground_stop_row_px")


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """Pairs whose files must be read to know whether they are what the manifest says; one task's worth.

    Attributes:
        root: Root of the raw data.
        rules: What the layout says about its images.
        check_images: Decode them too.
        pairs: The pairs.
        expected: What the manifest says of each pair: its two files' hashes, or why it is excluded.
    """

    root: RawFolder
    rules: ImageRules
    check_images: bool
    pairs: Sequence[PairSource]
    expected: Sequence[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What has changed.

    Attributes:
        num_kept: Pairs in shards all of whose pairs are unchanged.
        kept_shards: Numbers of those shards.
        remaining: By number of each other shard the pairs that remain in it, in their order.
        new: Pairs that the manifest does not have, or has in another split.
        dropped: Keys that the raw data does not have any more, or has in another split.
        changed: Keys of pairs whose images or facts are others now.
        still_excluded: Problems of pairs that could not be used before and have not been touched since.
    """

    num_kept: int
    kept_shards: list[int]
    remaining: dict[int, list[PairSource]]
    new: list[PairSource]
    dropped: list[str]
    changed: list[str]
    still_excluded: list[Problem]


class Stamps:
    """Which state of each pair's files was read last, and whether its images were decoded then."""

    def __init__(self, known: Mapping[str, int]) -> None:
        self._known = known
        self._recognised: set[str] = set()

    @classmethod
    def read(cls, store: Store, digest: str) -> Stamps:
        """Read those of a manifest; without them every pair's files are looked at anew.

        Raises:
            StoreError: The store cannot be read.
        """
        path = _stamps_file(digest)
        if not store.exists(path):
            return cls({})
        try:
            table = read_parquet(store.read_bytes(path))
            return cls(dict(zip(table["key"].to_pylist(), table["stamp"].to_pylist(), strict=True)))
        except (OSError, pa.ArrowException, KeyError) as error:
            _LOGGER.warning("%s is damaged (%s): the raw files are read anew", store.uri(path), error)
            return cls({})

    def knows(self, pair: PairSource, *, check_images: bool) -> bool:
        """Tell whether the pair's files are as they were, decoded then if they are to be."""
        known = self._known.get(pair.key)
        if known is None:
            return False
        if known == _stamp(pair, is_checked=True) or (not check_images and known == _stamp(pair, is_checked=False)):
            self._recognised.add(pair.key)
            return True
        return False

    def write(self, store: Store, digest: str, pairs: Sequence[PairSource], *, check_images: bool) -> None:
        """Write the stamps of `pairs`, all read by now, beside the manifest of that digest.

        Raises:
            StoreError: The store cannot be written.
        """
        new = {
            pair.key: self._known[pair.key] if pair.key in self._recognised else _stamp(pair, is_checked=check_images)
            for pair in pairs
        }
        if new == self._known:
            return
        stamps = pa.array(new.values(), pa.uint64())
        stream = io.BytesIO()
        pq.write_table(pa.table({"key": pa.array(new, pa.string()), "stamp": stamps}), stream, compression="zstd")
        store.write_bytes(_stamps_file(digest), stream.getvalue())


def find_changes(
    scan: SourceScan,
    base: Manifest,
    stamps: Stamps,
    *,
    check_images: bool,
    retry_excluded: bool,
    settle: Callable[[Sequence[Doubt]], Iterator[list[str]]],
) -> Changes:
    """Compare raw data with a manifest.

    Args:
        scan: The raw data.
        base: The manifest.
        stamps: Those of the manifest.
        check_images: Whether images must have been decoded to count as known.
        retry_excluded: Count pairs that could not be used before as new, though nobody touched their files.
        settle: Runs `differing_pairs` on each doubt.
    """
    listed = {pair.key: pair for pair in scan.pairs}
    columns = {name: base.pairs[name].to_pylist() for name in ("key", "shard", "split", *FACTS, *_ROWS)}
    held = set(columns["key"])
    doubtful: list[int] = []
    changed: set[str] = set()
    dropped: list[str] = []
    facts = zip(*(columns[name] for name in (*FACTS, *_ROWS)), strict=True)
    for row, (key, split, fact) in enumerate(zip(columns["key"], columns["split"], facts, strict=True)):
        pair = listed.get(key)
        if pair is None or pair.split != split:
            dropped.append(key)
        elif fact[: len(FACTS)] != pair_facts(pair) or not _has_rows_of(pair, fact[len(FACTS) :], base):
            changed.add(key)
        elif not stamps.knows(pair, check_images=check_images):
            doubtful.append(row)
    excluded = {} if retry_excluded else _excluded_before(base, listed, held)
    doubts = [(listed[key], hashes) for key, hashes in _hashes(base, doubtful)]
    for key, problems in excluded.items():
        if not stamps.knows(listed[key], check_images=check_images):
            doubts.append((listed[key], _unusable(problems)))
    differing = {key for keys in settle(_tasks(scan, doubts, check_images)) for key in keys}
    changed |= differing & held
    still_excluded = [one for key, problems in excluded.items() if key not in differing for one in problems]
    gone = set(dropped)
    touched = {shard for key, shard in zip(columns["key"], columns["shard"], strict=True) if key in changed | gone}
    remaining: dict[int, list[PairSource]] = {shard: [] for shard in sorted(touched)}
    for key, shard in zip(columns["key"], columns["shard"], strict=True):
        if shard in touched and key not in gone:
            remaining[shard].append(listed[key])
    known = (held - gone) | {problem.key for problem in still_excluded}
    kept_shards = [number for number in range(len(base.shards)) if number not in touched]
    return Changes(
        num_kept=sum(base.shards[number].num_pairs for number in kept_shards),
        kept_shards=kept_shards,
        remaining=remaining,
        new=[pair for pair in scan.pairs if pair.key not in known],
        dropped=dropped,
        changed=sorted(changed),
        still_excluded=still_excluded,
    )


def differing_pairs(doubt: Doubt) -> list[str]:
    """Read the pairs' files and return the keys of those that are not what the manifest says.

    Raises:
        StoreError: Raw data in a store cannot be read.
    """
    keys = []
    for pair, expected in zip(doubt.pairs, doubt.expected, strict=True):
        images, problems = load_pair(pair, doubt.root, rules=doubt.rules, check_images=doubt.check_images)
        if (original_hashes(images) if len(images) == len(ROLES) else _unusable(problems)) != expected:
            keys.append(pair.key)
    return keys


def _excluded_before(base: Manifest, listed: Mapping[str, PairSource], held: set[str]) -> dict[str, list[Problem]]:
    """Return why pairs of the raw data could not be used when the manifest was made, by key."""
    excluded: dict[str, list[Problem]] = {}
    for problem in base.excluded:
        if problem.is_unusable and problem.key is not None and problem.key in listed and problem.key not in held:
            excluded.setdefault(problem.key, []).append(problem)
    return excluded


def _unusable(problems: Sequence[Problem]) -> tuple[str, ...]:
    return tuple(sorted(str(problem) for problem in problems if problem.is_unusable))


def _hashes(base: Manifest, rows: Sequence[int]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the key of each row and the hashes of its raw files."""
    suffix = "xxh3_128" if base.profile.name == "original" else "source_xxh3_128"
    part = base.pairs.select(["key", *(f"{role}_{suffix}" for role in ROLES)]).take(pa.array(rows, pa.int64()))
    for key, *hashes in zip(*(column.to_pylist() for column in part.columns), strict=True):
        yield key, tuple(hashes)


def _tasks(scan: SourceScan, doubts: Sequence[tuple[PairSource, tuple[str, ...]]], check_images: bool) -> list[Doubt]:
    if doubts:
        _LOGGER.info("%d pairs' files have other times or places than last time: reading them", len(doubts))
    parts = [doubts[start : start + _PAIRS_PER_TASK] for start in range(0, len(doubts), _PAIRS_PER_TASK)]
    return [
        Doubt(
            root=scan.root,
            rules=scan.rules,
            check_images=check_images,
            pairs=[pair for pair, _ in part],
            expected=[expected for _, expected in part],
        )
        for part in parts
    ]


def _has_rows_of(pair: PairSource, rows_px: tuple[object, ...], base: Manifest) -> bool:
    # Without rows of its own a pair has those that the layout's rules give to an image of its size.
    return base.profile != ORIGINAL or pair.ground_rows_px is None or rows_px == pair.ground_rows_px


def _stamp(pair: PairSource, *, is_checked: bool) -> int:
    ground, aerial = pair.ground_status, pair.aerial_status
    text = f"{ground.num_bytes} {ground.stamp} {aerial.num_bytes} {aerial.stamp} {is_checked}"
    return xxhash.xxh3_64_intdigest(text.encode())


def _stamps_file(digest: str) -> str:
    return f"stamps/{digest[:16]}.parquet"
