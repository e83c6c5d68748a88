"""CVACT: known by its files, not read yet. Its pairs, UTM positions and index lists come with `ACT_data.mat`."""

from __future__ import annotations

from cvft.errors import DataError
from pipeline.raw import RawFolder
from pipeline.sources.base import SourceScan

MARKERS = ("ACT_data.mat", "ANU_data_small", "ANU_data_test", "satview_polish")


class CvactSource:
    """The CVACT layout; it is detected, so that its users are told where they stand."""

    looks_for = f"{' or '.join(MARKERS)}"

    def detect(self, root: RawFolder) -> str | None:
        """Return the root if it holds one of CVACT's files or folders."""
        return "" if any(root.has(marker) for marker in MARKERS) else None

    def scan(self, base: str, *, root: RawFolder, split: str | None) -> SourceScan:
        """Refuse.

        Raises:
            DataError: Always, for now.
        """
        raise DataError(
            f"{root.uri}: the layout cvact is not supported yet; "
            "list its pairs in a pairs.csv (key,ground,aerial) instead"
        )
