"""The list of pairs to leave out, as `validate --fix-list` writes it: one key a line, what follows `#` is a comment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cvft.errors import DataError
from pipeline.sources.base import Problem, SourceScan, printable
from pipeline.storage import Store

EXCLUDED_BY_LIST = "excluded_by_list"
_COMMENT = re.compile(r"(?:^|\s)#")  # a key may hold a #, but neither begin with one nor hold a blank


def read_exclusions(uri: str | Path) -> dict[str, str]:
    """Return the keys of an exclusion list, each with its comment.

    Raises:
        DataError: It is not UTF-8.
        StoreError: It cannot be read.
    """
    place = Store.from_uri(uri).uri()
    folder, _, name = place.rpartition("/")
    try:
        text = Store.from_uri(folder).read_bytes(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is no exclusion list: {error}; write one key a line in UTF-8") from None
    lines = ([*_COMMENT.split(line, maxsplit=1), ""] for line in text.splitlines())
    return {key.strip(): comment.strip() for key, comment, *_ in lines if key.strip()}


def leave_out(scan: SourceScan, exclusions: Mapping[str, str], *, named_by: str) -> SourceScan:
    """Take the listed pairs out of a scan, usable or not; each becomes one problem of kind `excluded_by_list`.

    Raises:
        DataError: A key of the list is in the dataset nowhere.
    """
    files = {problem.key: problem.path for problem in scan.problems if problem.is_unusable}
    files |= {pair.key: f"{pair.ground}, {pair.aerial}" for pair in scan.pairs if pair.key in exclusions}
    unknown = [key for key in exclusions if key not in files]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise DataError(f"{named_by}: lists key {unknown[0]!r}{more}, which the raw data does not have; remove it")
    listed = [
        Problem(kind=EXCLUDED_BY_LIST, key=key, path=printable(files[key]), detail=comment or f"listed in {named_by}")
        for key, comment in sorted(exclusions.items())
    ]
    others = [problem for problem in scan.problems if not (problem.is_unusable and problem.key in exclusions)]
    pairs = [pair for pair in scan.pairs if pair.key not in exclusions]
    return replace(scan, pairs=pairs, problems=[*others, *listed])
