"""What `validate` found, as a table for people at a terminal."""

from __future__ import annotations

import textwrap

from pipeline.sources.base import Problem
from pipeline.sources.kinds import KINDS
from pipeline.validate import ValidationReport

_WIDTH = 110
_NUM_SIZES = 4
_NUM_FIRST = 3


def validation_text(report: ValidationReport) -> str:
    """Return what is there, what leaks, and each kind of problem with its meaning, the worst first."""
    scan = report.scan
    place = f", found in {scan.base}" if scan.base else ""
    lines = [f"{scan.root.uri}: layout {scan.layout}{place}", ""]
    lines += [f"  {split:12} {count:>9,} usable pairs" for split, count in report.pairs.items()]
    for role, images in report.images.items():
        sizes = [f"{width}x{height} ({n:,})" for (height, width), n in images.sizes_px.most_common(_NUM_SIZES)]
        if len(images.sizes_px) > _NUM_SIZES:
            sizes.append(f"and {len(images.sizes_px) - _NUM_SIZES} other sizes")
        shown = ", ".join(sizes) or "not opened"
        lines.append(f"  {role:12} {images.num_files:>9,} files, {format_bytes(images.num_bytes)}: {shown}")
    lines += ["", *_leak_lines(report)]
    for kind in ordered_kinds(report):
        lines += ["", *_kind_lines(kind, report)]
    lines += ["", f"  {verdict(report)}"]
    return "\n".join(lines)


def ordered_kinds(report: ValidationReport) -> list[str]:
    """Return the kinds that occur: unusable ones first, then leaks, then by how often they do."""

    def place(kind: str) -> tuple[bool, bool, int, str]:
        return not KINDS[kind].is_unusable, not kind.startswith("leak_"), -report.problems[kind], kind

    return sorted(report.problems, key=place)


def verdict(report: ValidationReport) -> str:
    """Return in one sentence whether the dataset can be used."""
    if not report.ok:
        return f"Not usable as it is: {report.summary}"
    return "Usable." if not report.problems else "Usable; what is listed here is worth knowing."


def leak_sentence(report: ValidationReport) -> str:
    """Return why leaks are not known, or an empty string if they are."""
    if report.leaks is not None:
        return ""
    if report.train_split not in report.pairs:
        return f"Leaks are unknown: no usable pair is in a split {report.train_split!r} to compare with."
    return "Leaks are unknown: images were not opened and no pair has a location, so there is nothing to compare by."


def format_bytes(num_bytes: int) -> str:
    """Write a number of bytes as a person would: 812 kB, 3.2 GB."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "kB") else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _leak_lines(report: ValidationReport) -> list[str]:
    if report.leaks is None:
        return [f"  {leak_sentence(report)}"]
    lines = []
    for split, leaks in report.leaks.items():
        traits = ", ".join(f"{trait.replace('_', ' ')} {count:,}" for trait, count in leaks.num_by_trait.items())
        lines.append(
            f"  {split}: {leaks.num_leaked:,} of {leaks.num_pairs:,} pairs ({leaks.num_leaked / leaks.num_pairs:.2%})"
            f" stand in {report.train_split} as well (by {traits}); {leaks.num_twins:,} have a twin in {split}"
        )
    return lines or [f"  Leaks: there is no split besides {report.train_split}."]


def _kind_lines(name: str, report: ValidationReport) -> list[str]:
    kind = KINDS[name]
    problems = [problem for problem in report.details if problem.kind == name]
    mark = "UNUSABLE" if kind.is_unusable else "noted"
    lines = [f"  {mark:8}  {name}: {len(problems):,}"]
    lines += [_wrapped("why", kind.consequence), _wrapped("do", kind.remedy)]
    lines += [_wrapped("", _example(problem)) for problem in problems[:_NUM_FIRST]]
    if len(problems) > _NUM_FIRST:
        lines.append(_wrapped("", f"... and {len(problems) - _NUM_FIRST:,} more"))
    return lines


def _example(problem: Problem) -> str:
    return f"- {problem.path}" + (f" ({problem.detail})" if problem.detail else "")


def _wrapped(label: str, text: str) -> str:
    indent = f"            {label:4} "
    return textwrap.fill(
        text, _WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False
    )
