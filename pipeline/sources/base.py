"""What every source is and gives: the pairs that can be used, and each thing that is wrong, by kind and by name."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

from cvft.errors import DataError
from pipeline.raw import RawFolder
from pipeline.schema import ImageRules, Layout, Location, PairSource
from pipeline.sources.kinds import KINDS, UNUSABLE_KINDS
from pipeline.storage import FileStatus

# A USTAR name holds 100 bytes, and the longest member is "<key>.aerial.jpg".
MAX_KEY_BYTES = 100 - len(".aerial.jpg")
_SUFFIXES = (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG")
_KEY = re.compile(r"(?!#)[^./\\\s]+")  # lists of keys have comments behind a #


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong with the raw data.

    Attributes:
        kind: One of `kinds.KINDS`.
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
        root: Folder that all paths are relative to.
        pairs: The pairs whose two files are there, in the order listed, keys unique.
        problems: Everything found on the way.
        rules: What the layout says about its images.
        base: Folder (or file) below the root where the layout was found; empty for the root itself.
    """

    layout: Layout
    root: RawFolder
    pairs: Sequence[PairSource]
    problems: Sequence[Problem]
    rules: ImageRules = field(default_factory=ImageRules)
    base: str = ""


class Source(Protocol):
    """A layout. To add one, write a class like this and enter it in `detect.SOURCES`.

    Attributes:
        looks_for: The files by which the layout is known, in words for messages.
    """

    looks_for: str

    def detect(self, root: RawFolder) -> str | None:
        """Return the folder (or file) below `root`, or "" for `root` itself, where this layout starts, or None."""
        ...

    def near_miss(self, root: RawFolder) -> str:
        """Return what is there of this layout in a root that `detect` refused, in words, or an empty string."""
        ...

    def scan(self, base: str, *, root: RawFolder, split: str | None) -> SourceScan:
        """List the pairs under `base` (what `detect` returned)."""
        ...


@dataclass(kw_only=True, slots=True)
class Row:
    """One listed pair, whatever file listed it; paths are relative to the root."""

    key: str
    split: str
    ground: str
    aerial: str
    location: Location | None
    location_trouble: str
    listed_in: str
    location_id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


class RowChecker:
    """Turns listed rows into usable pairs: checks keys, repeats and files, and keeps count of everything else."""

    def __init__(self, root: RawFolder, *, missing_hint: str = "", is_suffix_sure: bool = False) -> None:
        self.pairs: list[PairSource] = []
        self.problems: list[Problem] = []
        self._root = root
        self._missing_hint = missing_hint
        self._is_suffix_sure = is_suffix_sure  # spares looking for each missing file under other suffixes
        self._seen: dict[str, Row] = {}
        self._good_splits: set[str] = set()

    def note(self, kind: str, *, key: str | None, path: str, detail: str) -> None:
        """Record a problem."""
        self.problems.append(Problem(kind=KINDS[kind].name, key=key, path=printable(path), detail=printable(detail)))

    def add(self, row: Row) -> None:
        """Take the row as a pair, or record why not."""
        if not self._has_names(row) or self._is_repeat(row):
            return
        ground = self._file(row, "ground", row.ground)
        aerial = self._file(row, "aerial", row.aerial)
        if ground is None or aerial is None:
            return
        ground_path, ground_status = ground
        aerial_path, aerial_status = aerial
        if row.location is None:
            self.note("no_location", key=row.key, path=row.listed_in, detail=row.location_trouble)
        self.pairs.append(
            PairSource(
                key=row.key,
                split=row.split,
                ground=ground_path,
                aerial=aerial_path,
                ground_status=ground_status,
                aerial_status=aerial_status,
                location=row.location,
                location_id=row.location_id or row.key,
                metadata=row.metadata,
            )
        )

    def _has_names(self, row: Row) -> bool:
        trouble = key_trouble(row.key)
        if trouble:
            self.note("bad_key", key=None, path=row.listed_in, detail=f"key {printable(row.key)!r} {trouble}")
            return False
        if row.split in self._good_splits:
            return True
        trouble = key_trouble(row.split)  # it names shards, whose paths must not leave the store
        if trouble:
            detail = f"split {printable(row.split)!r} {trouble}"
            self.note("bad_row", key=row.key, path=row.listed_in, detail=detail)
            return False
        self._good_splits.add(row.split)
        return True

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

    def _file(self, row: Row, role: str, path: str) -> tuple[str, FileStatus] | None:
        """Return an image's path and status, or None (and note why) if it cannot be used."""
        status = self._root.status(path)
        if status is not None and status.num_bytes and path.isascii():
            return path, status
        if status is None:
            listed, path = path, "" if self._is_suffix_sure else self._of_other_suffix(path)
            status = self._root.status(path) if path else None
            if status is None:
                detail = f"listed in {row.listed_in}, no such file{self._missing_hint}"
                self.note(f"missing_{role}", key=row.key, path=listed, detail=detail)
                return None
            detail = f"{row.listed_in} names {listed.rpartition('/')[2]}"
            self.note("other_suffix", key=row.key, path=path, detail=detail)
        if status.num_bytes == 0:
            self.note("empty_file", key=row.key, path=path, detail="zero bytes")
            return None
        if not _is_utf8(path):
            self.note("non_utf8_name", key=row.key, path=path, detail="the name is not UTF-8")
        return path, status

    def _of_other_suffix(self, path: str) -> str:
        """Return the file that is there under the same name with another suffix, or an empty string."""
        stem, dot, _ = path.rpartition(".")
        candidates = (stem + suffix for suffix in _SUFFIXES if dot)
        return next((candidate for candidate in candidates if self._root.status(candidate) is not None), "")


def key_trouble(key: str) -> str:
    """Return why `key` cannot name members of a tar, or an empty string."""
    if key.isascii() and key.isalnum() and len(key) <= MAX_KEY_BYTES:
        return ""  # nearly all of them, at a tenth of the time
    if not _KEY.fullmatch(key):
        return "is empty or has a dot, a slash or white space, or begins with #"
    if not _is_utf8(key):
        return "is not UTF-8"
    if len(key.encode()) > MAX_KEY_BYTES:
        return f"has more than {MAX_KEY_BYTES} bytes"
    return ""


def printable(text: str) -> str:
    """Return a path or a name with bytes that are not UTF-8 escaped."""
    return text if text.isascii() else text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def some_names(root: RawFolder, folder: str = "", limit: int = 8) -> str:
    """Return the first names in a folder, for messages."""
    names = [printable(name) for name in root.names(folder)]
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + rest


def csv_rows(root: RawFolder, path: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file, each with the number of its last line; a blank line is a row without cells.

    Raises:
        DataError: A quoted cell does not end where it should: it would swallow the rows behind it.
    """
    reader = csv.reader(io.StringIO(root.read_text(path), newline=""), strict=True)
    first_line = 1
    try:
        for cells in reader:
            yield reader.line_num, cells
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{root.uri}/{path}:{first_line}: {error}; close or remove a quotation mark there") from None


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


def nestings(*names: str) -> tuple[str, ...]:
    """Return the folders, shallow ones first, that unpacking makes of folders of these names, one to three deep."""
    return ("", *("/".join(parts) for depth in (1, 2, 3) for parts in product(names, repeat=depth)))


def join(folder: str, name: str) -> str:
    """Return the path of `name` in `folder`, where "" is the root; an absolute name stays what it is."""
    return f"{folder}/{name}" if folder and not name.startswith("/") else name


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
