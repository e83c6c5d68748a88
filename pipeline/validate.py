"""Is this folder a dataset? Which layout, which pairs, what is wrong with it, by kind and by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cvft.errors import DataError
from pipeline.images import ImageInfo, check_decodes, read_info
from pipeline.raw import RawFolder
from pipeline.schema import ImageRules, PairSource
from pipeline.sources.base import Problem, SourceScan, count_kinds, count_splits, printable, unusable_summary
from pipeline.sources.detect import open_source

ROLES = ("ground", "aerial")
_JPEG_SUFFIXES = (".jpg", ".jpeg")
_END_OF_JPEG = b"\xff\xd9"


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


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """One image as it will stand in a shard.

    Attributes:
        data: Its own bytes.
        info: What its header says.
        rows_px: Rows [first, stop) of it that are used; none for all.
    """

    data: bytes
    info: ImageInfo
    rows_px: tuple[int, int] | None = None


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


def load_pair(
    pair: PairSource, root: RawFolder, *, rules: ImageRules, check_images: bool
) -> tuple[dict[str, LoadedImage], list[Problem]]:
    """Read a pair's two images and say what is wrong with them.

    Returns:
        The images by role (`ground`, `aerial`), those that cannot be used left out, and the problems.

    Raises:
        StoreError: The object store cannot be read.
    """
    images: dict[str, LoadedImage] = {}
    problems: list[Problem] = []
    for role, path in zip(ROLES, (pair.ground, pair.aerial), strict=True):
        image, kinds = _load(path, root, role=role, check_images=check_images)
        if image is not None:
            size = (image.info.height_px, image.info.width_px)
            rows = (pair.ground_rows_px or rules.ground_rows_px.get(size)) if role == "ground" else None
            images[role] = LoadedImage(data=image.data, info=image.info, rows_px=rows)
            kinds = _oddities(path, image.info, role=role, usual_px=rules.usual_sizes_px.get(role))
        shown = printable(path)
        problems.extend(Problem(kind=kind, key=pair.key, path=shown, detail=why) for kind, why in kinds.items())
    return images, problems


def _load(path: str, root: RawFolder, *, role: str, check_images: bool) -> tuple[LoadedImage | None, dict[str, str]]:
    """Return the image, or None and the kind of trouble with what is wrong."""
    try:
        data = root.read_bytes(path)
    except DataError as error:
        is_there = root.status(path) is not None
        return None, {"unreadable": str(error)} if is_there else {f"missing_{role}": "no such file"}
    try:
        info = read_info(data)
        if check_images:
            check_decodes(data, info)
    except DataError as error:
        return None, {_damage_kind(data): str(error)}
    return LoadedImage(data=data, info=info), {}


def _check_all(scan: SourceScan, num_threads: int) -> Iterator[tuple[PairSource, list[Problem]]]:
    """Check pair after pair in threads, in order, never holding more than a window of them."""

    def check(pair: PairSource) -> tuple[PairSource, list[Problem]]:
        return pair, load_pair(pair, scan.root, rules=scan.rules, check_images=True)[1]

    with ThreadPoolExecutor(num_threads) as pool:
        remaining = iter(scan.pairs)
        while window := list(islice(remaining, 64 * num_threads)):
            yield from pool.map(check, window)


def _damage_kind(data: bytes) -> str:
    if not data:
        return "empty_file"
    is_jpeg = data.startswith(b"\xff\xd8")
    # A download that broke off lacks the end marker; some tools fill the rest with zeros.
    return "truncated" if is_jpeg and not data.rstrip(b"\0").endswith(_END_OF_JPEG) else "unreadable"


def _oddities(path: str, info: ImageInfo, *, role: str, usual_px: tuple[tuple[int, int], ...] | None) -> dict[str, str]:
    kinds = {}
    size = (info.height_px, info.width_px)
    shown = f"{info.width_px}x{info.height_px}"
    if info.kind == "png" and path.lower().endswith(_JPEG_SUFFIXES):
        kinds["not_jpeg"] = "a PNG by its content"
    if info.colorspace in {"Gray", "L", "1", "I", "LA", "I;16"}:
        kinds["greyscale"] = "one channel"
    if info.colorspace in {"CMYK", "YCCK"}:
        kinds["cmyk"] = "four channels"
    if usual_px is not None and size not in usual_px:
        usual = " or ".join(f"{width}x{height}" for height, width in usual_px)
        kinds["odd_size"] = f"{shown}, usual is {usual}"
    elif role == "aerial" and size[0] != size[1]:
        kinds["odd_size"] = f"{shown}, an aerial image is usually square"
    return kinds
