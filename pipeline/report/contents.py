"""What a report is made of, as plain data: it knows nothing of models, manifests or checkpoints.

Shape letters: n source positions of the panorama, m target cells of the aerial image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.floating[Any]]
BoolArray: TypeAlias = NDArray[np.bool_]
IntArray: TypeAlias = NDArray[np.integer[Any]]
ImageArray: TypeAlias = NDArray[np.uint8]
PairImages: TypeAlias = Callable[[int], tuple[ImageArray, ImageArray]]
"""From a query's index to its ground and its aerial image, uint8 [H, W, 3] in RGB order."""


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """The dataset behind the numbers.

    Attributes:
        layout: Layout of the raw data (`cvusa`, `table`, ...).
        manifest_digest: Identity of the dataset.
        pairs: Number of pairs of each split.
        num_shards: Number of shards.
        num_bytes: Their size together.
        problems: Number of excluded pairs for each kind of problem.
        locations_deg: Latitude and longitude of a split's pairs, float64 [pairs, 2]; splits without locations are left
            out, rows without one hold NaN.
    """

    layout: str
    manifest_digest: str
    pairs: Mapping[str, int]
    num_shards: int
    num_bytes: int
    problems: Mapping[str, int] = field(default_factory=dict)
    locations_deg: Mapping[str, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TransportExample:
    """The transport of one query.

    Attributes:
        index: The query.
        plan: Mass moved from panorama position i to aerial cell j, both in row-major order, [n, m].
        source_grid: Rows and columns of the panorama's positions.
        target_grid: Rows and columns of the aerial cells.
    """

    index: int
    plan: FloatArray
    source_grid: tuple[int, int]
    target_grid: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Where the report was written.

    Attributes:
        html: The page.
        pngs: Its pictures, in the page's order.
    """

    html: Path
    pngs: list[Path]
