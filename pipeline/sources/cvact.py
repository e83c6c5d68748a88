"""CVACT: known by its files, not read yet. Its pairs, UTM positions and index lists come with `ACT_data.mat`."""

from __future__ import annotations

from pathlib import Path

from cvft.errors import DataError
from pipeline.sources.base import SourceScan

MARKERS = ("ACT_data.mat", "ANU_data_small", "ANU_data_test", "satview_polish")


class CvactSource:
    """The CVACT layout; it is detected, so that its users are told where they stand."""

    looks_for = f"{' or '.join(MARKERS)}"

    def detect(self, root: Path) -> Path | None:
        """Return `root` if it holds one of CVACT's files or folders."""
        return root if any((root / marker).exists() for marker in MARKERS) else None

    def scan(self, base: Path, *, root: Path, split: str | None) -> SourceScan:
        """Refuse.

        Raises:
            DataError: Always, for now.
        """
        raise DataError(
            f"{base}: the layout cvact is not supported yet; list its pairs in a pairs.csv (key,ground,aerial) instead"
        )
