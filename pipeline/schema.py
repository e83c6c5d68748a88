"""The words that sources, shards and manifests share.

A pair is five things on its way: a `PairSource` on disk, members of a shard, a row of the manifest, a row of a `Batch`,
two descriptors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Layout = Literal["cvusa", "cvact", "table"]
TRAIN = "train"
VAL = "val"


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where the ground photo was taken.

    Attributes:
        latitude_deg: WGS84 latitude.
        longitude_deg: WGS84 longitude.
        heading_deg: Compass heading recorded with the photo, clockwise from north; none if unknown. CVUSA's is the
            camera car's: its panoramas have north in the middle all the same.
    """

    latitude_deg: float
    longitude_deg: float
    heading_deg: float | None = None


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """One pair as it lies on disk before sharding.

    Attributes:
        key: Unique within the dataset, no dots or slashes, short enough for a name in a tar (see `key_trouble`).
        split: Name of the split (`train`, `val`, ...).
        ground: File of the ground image.
        aerial: File of the aerial image.
        location: Where it was taken, if known.
        location_id: Identity that both views share; equals `key` unless the layout says otherwise.
    """

    key: str
    split: str
    ground: Path
    aerial: Path
    location: Location | None
    location_id: str
