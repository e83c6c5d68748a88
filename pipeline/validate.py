"""Is this folder a dataset? Which layout, which pairs, what is wrong with it, by kind and by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cvft.errors import DataError
from pipeline.images import ImageInfo, check_decodes, read_info
from pipeline.schema import PairSource
from pipeline.sources.base import Problem, SourceScan, count_kinds, count_splits, display_path, unusable_summary
from pipeline.sources.detect import open_source

ROLES = ("ground", "aerial")
_JPEG_SUFFIXES = frozenset({".jpg", ".jpeg"})
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
    """One image as it will stand in a shard: its own bytes and what its header says."""

    data: bytes
    info: ImageInfo


def validate(
    root: Path,
    *,
    layout: str = "auto",
    split: str | None = None,
    check_images: bool = True,
    num_threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> ValidationReport:
    """List the pairs under `root` and check them.

    Args:
        root: Folder of the dataset, or a table of pairs.
        layout: `auto` or the layout it must be.
        split: See `open_source`.
        check_images: Also decode every image (at an eighth of its size); otherwise only the files' presence is checked.
        num_threads: Images are read and decoded in this many threads.
        progress: Called with the number of pairs checked and of all pairs.

    Raises:
        DataError: The folder is of no known layout.
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
    pair: PairSource, scan_root: Path, *, usual_size_px: Mapping[str, tuple[int, int]], check_images: bool
) -> tuple[dict[str, LoadedImage], list[Problem]]:
    """Read a pair's two images and say what is wrong with them.

    Returns:
        The images by role (`ground`, `aerial`), those that cannot be used left out, and the problems.
    """
    images: dict[str, LoadedImage] = {}
    problems: list[Problem] = []
    for role, path in zip(ROLES, (pair.ground, pair.aerial), strict=True):
        kinds = {}
        try:
            data = path.read_bytes()
            info = read_info(data)
            if check_images:
                check_decodes(data, info)
        except FileNotFoundError:
            kinds[f"missing_{role}"] = "no such file"
        except OSError as error:
            kinds["unreadable"] = str(error.strerror)
        except DataError as error:
            kinds[_damage_kind(data)] = str(error)
        else:
            images[role] = LoadedImage(data=data, info=info)
            kinds = _oddities(path, info, role=role, usual_px=usual_size_px.get(role))
        shown = display_path(path, scan_root)
        problems.extend(Problem(kind=kind, key=pair.key, path=shown, detail=why) for kind, why in kinds.items())
    return images, problems


def _check_all(scan: SourceScan, num_threads: int) -> Iterator[tuple[PairSource, list[Problem]]]:
    """Check pair after pair in threads, in order, never holding more than a window of them."""

    def check(pair: PairSource) -> tuple[PairSource, list[Problem]]:
        return pair, load_pair(pair, scan.root, usual_size_px=scan.usual_size_px, check_images=True)[1]

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


def _oddities(path: Path, info: ImageInfo, *, role: str, usual_px: tuple[int, int] | None) -> dict[str, str]:
    kinds = {}
    size = (info.height_px, info.width_px)
    shown = f"{info.width_px}x{info.height_px}"
    if info.kind == "png" and path.suffix.lower() in _JPEG_SUFFIXES:
        kinds["not_jpeg"] = "a PNG by its content"
    if info.colorspace in {"Gray", "L", "1", "I", "LA", "I;16"}:
        kinds["greyscale"] = "one channel"
    if info.colorspace in {"CMYK", "YCCK"}:
        kinds["cmyk"] = "four channels"
    if usual_px is not None and size != usual_px:
        kinds["odd_size"] = f"{shown}, usual is {usual_px[1]}x{usual_px[0]}"
    elif role == "aerial" and size[0] != size[1]:
        kinds["odd_size"] = f"{shown}, an aerial image is usually square"
    return kinds
