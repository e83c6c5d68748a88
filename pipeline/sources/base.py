"""What every source is and gives: the pairs that can be used, and each thing that is wrong, by kind and by name."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cvft.errors import DataError
from pipeline.schema import Layout, Location, PairSource

# A USTAR name holds 100 bytes, and the longest member is "<key>.aerial.jpg".
MAX_KEY_BYTES = 100 - len(".aerial.jpg")
_KEY = re.compile(r"[^./\\\s]+")

# A pair (or a row) with one of these cannot go into a shard. Every other kind is noted and the pair is used.
UNUSABLE_KINDS = frozenset(
    {
        "missing_ground",  # the row names a file that is not there
        "missing_aerial",
        "empty_file",  # zero bytes: a broken download
        "truncated",  # the image ends too early
        "unreadable",  # neither JPEG nor PNG, or damaged
        "duplicate_key",  # another row with other files or another split has the same key
        "bad_key",  # cannot name members of a tar
        "bad_row",  # too few columns, or a split that cannot name a shard
    }
)
NOTED_KINDS = frozenset(
    {
        "no_location",  # distances in metres leave this pair out
        "not_jpeg",  # a PNG; it keeps its bytes and is decoded as what it is
        "greyscale",  # becomes RGB on decoding
        "cmyk",  # becomes RGB on decoding
        "odd_size",  # not the layout's usual size; it is resized like the others
        "duplicate_row",  # the same row once more: a repeat loses nothing
        "non_utf8_name",  # the file is read, its name is printed escaped
        "unknown_column",  # a table's column that nothing reads
    }
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with the raw data.

    Attributes:
        kind: One of `UNUSABLE_KINDS` or `NOTED_KINDS`.
        key: The pair, or none if the row has no key.
        path: The file concerned, relative to the dataset's root and printable.
        detail: What is wrong with it, in words.
    """

    kind: str
    key: str | None
    path: str
    detail: str

    @property
    def is_unusable(self) -> bool:
        """Whether the pair has to be left out."""
        return self.kind in UNUSABLE_KINDS

    def __str__(self) -> str:
        """Return the problem in one line."""
        return f"{self.path}: {self.kind} ({self.detail})"


@dataclass(frozen=True, kw_only=True)
class SourceScan:
    """What a source found under a root, before any image is opened.

    Attributes:
        layout: Which layout it is.
        root: Folder that the problems' paths are relative to.
        pairs: The pairs whose two files are there, in the order listed, keys unique.
        problems: Everything found on the way.
        usual_size_px: Height and width of the layout's `ground` and `aerial` images, where it has such.
    """

    layout: Layout
    root: Path
    pairs: Sequence[PairSource]
    problems: Sequence[Problem]
    usual_size_px: dict[str, tuple[int, int]] = field(default_factory=dict)


class Source(Protocol):
    """A layout. To add one, write a class like this and enter it in `detect.SOURCES`.

    Attributes:
        looks_for: The files by which the layout is known, in words for messages.
    """

    looks_for: str

    def detect(self, root: Path) -> Path | None:
        """Return the folder (or file) below or at `root` where this layout starts, or None."""
        ...

    def scan(self, base: Path, *, root: Path, split: str | None) -> SourceScan:
        """List the pairs under `base` (what `detect` returned)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One listed pair, whatever file listed it."""

    key: str
    split: str
    ground: Path
    aerial: Path
    location: Location | None
    location_trouble: str
    listed_in: str


class RowChecker:
    """Turns listed rows into usable pairs: checks keys, repeats and files, and keeps count of everything else."""

    def __init__(self, root: Path) -> None:
        self.pairs: list[PairSource] = []
        self.problems: list[Problem] = []
        self._root = root
        self._seen: dict[str, Row] = {}

    def note(self, kind: str, *, key: str | None, path: Path | str, detail: str) -> None:
        """Record a problem; an absolute path is shown relative to the root."""
        self.problems.append(Problem(kind=kind, key=key, path=display_path(path, self._root), detail=detail))

    def add(self, row: Row) -> None:
        """Take the row as a pair, or record why not."""
        trouble = key_trouble(row.key)
        if trouble:
            self.note("bad_key", key=None, path=row.listed_in, detail=f"key {_printable(row.key)!r} {trouble}")
            return
        trouble = key_trouble(row.split)  # it names shards, whose paths must not leave the store
        if trouble:
            detail = f"split {_printable(row.split)!r} {trouble}"
            self.note("bad_row", key=row.key, path=row.listed_in, detail=detail)
            return
        if self._is_repeat(row) or not self._has_files(row):
            return
        if row.location is None:
            self.note("no_location", key=row.key, path=row.listed_in, detail=row.location_trouble)
        self.pairs.append(
            PairSource(
                key=row.key,
                split=row.split,
                ground=row.ground,
                aerial=row.aerial,
                location=row.location,
                location_id=row.key,
            )
        )

    def _is_repeat(self, row: Row) -> bool:
        first = self._seen.setdefault(row.key, row)
        if first is row:
            return False
        is_same = (first.split, first.ground, first.aerial) == (row.split, row.ground, row.aerial)
        detail = (
            "listed once more" if is_same else f"listed before in {first.listed_in} (split {first.split}) otherwise"
        )
        kind = "duplicate_row" if is_same else "duplicate_key"
        self.note(kind, key=row.key, path=row.listed_in, detail=f"key {row.key} {detail}")
        return True

    def _has_files(self, row: Row) -> bool:
        is_complete = True
        for role, path in (("ground", row.ground), ("aerial", row.aerial)):
            size = _file_size(path)
            if size is None:
                self.note(f"missing_{role}", key=row.key, path=path, detail=f"listed in {row.listed_in}, no such file")
            elif size == 0:
                self.note("empty_file", key=row.key, path=path, detail="zero bytes")
            elif not _is_utf8(path):
                self.note("non_utf8_name", key=row.key, path=path, detail="the name is not UTF-8")
            is_complete = is_complete and bool(size)
        return is_complete


def key_trouble(key: str) -> str:
    """Return why `key` cannot name members of a tar, or an empty string."""
    if not _KEY.fullmatch(key):
        return "is empty or has a dot, a slash or white space"
    if not _is_utf8(key):
        return "is not UTF-8"
    if len(key.encode()) > MAX_KEY_BYTES:
        return f"has more than {MAX_KEY_BYTES} bytes"
    return ""


def display_path(path: Path | str, root: Path) -> str:
    """Return `path` relative to `root` where it lies below it, with bytes that are not UTF-8 escaped."""
    text = str(path)
    prefix = f"{root}/"
    return _printable(text.removeprefix(prefix))


def count_kinds(problems: Iterable[Problem]) -> dict[str, int]:
    """Return how often each kind occurs, kinds in alphabetical order."""
    return dict(sorted(Counter(problem.kind for problem in problems).items()))


def count_splits(pairs: Iterable[PairSource]) -> dict[str, int]:
    """Return the number of pairs in each split, in alphabetical order."""
    return dict(sorted(Counter(pair.split for pair in pairs).items()))


def unusable_summary(problems: Sequence[Problem], *, num_usable: int) -> str:
    """Return one line that counts the unusable ones by kind and names the first, or an empty string if all is well."""
    unusable = [problem for problem in problems if problem.is_unusable]
    if not unusable:
        return "" if num_usable else "no pair is listed"
    kinds = ", ".join(f"{kind} {count}" for kind, count in count_kinds(unusable).items())
    return f"{num_usable} pairs are usable, others are not ({kinds}); first: {unusable[0]}"


def read_text(path: Path) -> str:
    """Return a list or table as text: a byte-order mark is dropped, bytes that are not UTF-8 survive as surrogates.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _file_size(path: Path) -> int | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _is_utf8(text: Path | str) -> bool:
    try:
        str(text).encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
