"""What `validate` found as one HTML page: what is there, what leaks, and the offenders with their pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cvft.errors import DataError, StoreError
from pipeline.images import encode_jpeg, thumbnail
from pipeline.report.render import render
from pipeline.report.validation_text import format_bytes, leak_sentence, ordered_kinds, verdict
from pipeline.schema import ROLES, PairSource
from pipeline.sources.base import Problem, printable
from pipeline.sources.kinds import KINDS, Kind
from pipeline.validate import Alike, ImageStatistics, ValidationReport

NUM_SHOWN = 12  # offenders with pictures for each kind; the others are counted
_NUM_SIZES = 8
_THUMBNAIL_PX = {"ground": 420, "aerial": 200}
_JPEG_QUALITY = 78


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A picture on the page, or what stands in its place.

    Attributes:
        image: As a data URI; empty if it cannot be decoded.
        role: `ground` or `aerial`.
        caption: Which file of which pair it is.
    """

    image: str
    role: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Offender:
    """One problem on the page.

    Attributes:
        path: The file or the line concerned.
        detail: What is wrong with it.
        thumbnails: Its image; two side by side for pairs that are alike; none for what is no image.
    """

    path: str
    detail: str
    thumbnails: Sequence[Thumbnail]


@dataclass(frozen=True, kw_only=True)
class KindSection:
    """One kind of problem on the page."""

    kind: Kind
    count: int
    offenders: Sequence[Offender]


def build_validation_page(out: Path, report: ValidationReport, *, num_shown: int = NUM_SHOWN) -> Path:
    """Write the page and return its place.

    Args:
        out: The file if it ends in `.html`, else a folder for `validation.html`.
        report: What was found; the offenders' images are read once more.
        num_shown: Offenders to show for each kind.
    """
    html = out if out.suffix == ".html" else out / "validation.html"
    html.parent.mkdir(parents=True, exist_ok=True)
    kinds = ordered_kinds(report)
    context = {
        "report": report,
        "verdict": verdict(report),
        "leak_sentence": leak_sentence(report),
        "num_pairs": sum(report.pairs.values()),
        "num_bytes": format_bytes(sum(images.num_bytes for images in report.images.values())),
        "num_unusable": sum(count for kind, count in report.problems.items() if KINDS[kind].is_unusable),
        "sizes": {role: _size_rows(images) for role, images in report.images.items()},
        "format_bytes": format_bytes,
        "sections": [
            KindSection(kind=KINDS[kind], count=report.problems[kind], offenders=_offenders(kind, report, num_shown))
            for kind in kinds
        ],
    }
    html.write_text(render("validation.html.j2", context), encoding="utf-8", errors="backslashreplace")
    return html


def _size_rows(images: ImageStatistics) -> list[tuple[str, int, float]]:
    """Return the commonest sizes: name, number of files and their share of all; the rest is summed up in one row."""
    found = images.sizes_px.most_common()
    rows = [(f"{width} × {height}", count) for (height, width), count in found[:_NUM_SIZES]]
    if rest := found[_NUM_SIZES:]:
        rows.append((f"{len(rest):,} other sizes", sum(count for _, count in rest)))
    return [(name, count, count / max(images.num_files, 1)) for name, count in rows]


def _offenders(kind: str, report: ValidationReport, num_shown: int) -> list[Offender]:
    alike = [one for one in report.alike if one.kind == kind]
    if alike:
        return [_alike_offender(one, report) for one in alike[:num_shown]]
    problems = [problem for problem in report.details if problem.kind == kind][:num_shown]
    wanted = {problem.key for problem in problems}
    pairs = {pair.key: pair for pair in report.scan.pairs if pair.key in wanted}
    return [
        Offender(
            path=problem.path,
            detail=problem.detail,
            thumbnails=_of_problem(problem, pairs.get(problem.key or ""), report),
        )
        for problem in problems
    ]


def _of_problem(problem: Problem, pair: PairSource | None, report: ValidationReport) -> list[Thumbnail]:
    """Return the picture that the problem is about, if it is about one of a listed pair."""
    if pair is not None:
        for role in ROLES:
            if printable(getattr(pair, role)) == problem.path:
                return [_thumbnail(pair, role, report)]
    return []


def _alike_offender(alike: Alike, report: ValidationReport) -> Offender:
    role = "aerial" if "aerial" in alike.kind else "ground"
    return Offender(
        path=f"{alike.pair.key} ({alike.pair.split}) and {alike.other.key} ({alike.other.split})",
        detail=_place(alike.pair) if "position" in alike.kind else "",
        thumbnails=[_thumbnail(pair, role, report) for pair in (alike.pair, alike.other)],
    )


def _place(pair: PairSource) -> str:
    place = pair.location
    if place is None:
        return ""
    heading = "" if place.heading_deg is None else f", heading {place.heading_deg:g}°"
    return f"{place.latitude_deg:.6f}, {place.longitude_deg:.6f}{heading}"


def _thumbnail(pair: PairSource, role: str, report: ValidationReport) -> Thumbnail:
    path = getattr(pair, role)
    caption = f"{pair.split}: {printable(path)}"
    try:
        pixels = thumbnail(report.scan.root.read_bytes(path), _THUMBNAIL_PX[role])
    except (DataError, StoreError):
        return Thumbnail(image="", role=role, caption=caption)  # the page tells its kind and shows an empty frame
    data = base64.b64encode(encode_jpeg(pixels, quality=_JPEG_QUALITY)).decode("ascii")
    return Thumbnail(image=f"data:image/jpeg;base64,{data}", role=role, caption=caption)
