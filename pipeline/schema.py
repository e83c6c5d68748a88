"""The words that sources, shards and manifests share.

A pair is five things on its way: a `PairSource` on disk, members of a shard, a row of the manifest, a row of a `Batch`,
two descriptors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.storage import FileStatus

Layout = Literal["cvusa", "cvact", "vigor", "table"]
TRAIN = "train"
VAL = "val"
TEST = "test"
ROLES = ("ground", "aerial")


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where the ground photo was taken.

    Attributes:
        latitude_deg: WGS84 latitude.
        longitude_deg: WGS84 longitude.
        heading_deg: Compass heading recorded with the photo, clockwise from north; none if unknown. CVUSA's is the
            camera car's: its panoramas have north in the middle all the same.
        easting_m: UTM easting where the dataset gives it (CVACT: zone 55 south), else none.
        northing_m: UTM northing in the same zone, else none.
    """

    latitude_deg: float
    longitude_deg: float
    heading_deg: float | None = None
    easting_m: float | None = None
    northing_m: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSource:
    """One pair as it lies on disk before sharding.

    Attributes:
        key: Unique within the dataset, no dots or slashes, short enough for a name in a tar (see `key_trouble`).
        split: Name of the split (`train`, `val`, ...).
        ground: File of the ground image, relative to the raw root, with forward slashes.
        aerial: File of the aerial image, likewise.
        ground_status: The ground file when the dataset was scanned.
        aerial_status: The aerial file when the dataset was scanned.
        location: Where it was taken, if known.
        location_id: Identity that both views share; equals `key` unless the layout says otherwise (in VIGOR it is the
            satellite image, which many pairs share).
        ground_rows_px: Rows [first, stop) of the ground image that are used; none for all, or for those that
            `ImageRules.ground_rows_px` names for images of that size.
        metadata: What else the layout knows of the pair, as plain JSON.
    """

    key: str
    split: str
    ground: str
    aerial: str
    ground_status: FileStatus
    aerial_status: FileStatus
    location: Location | None
    location_id: str
    ground_rows_px: tuple[int, int] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """What a layout says about its images, to be applied where their headers are read.

    Attributes:
        usual_sizes_px: Height and width of the layout's `ground` and `aerial` images, each in all variants met; a
            role that is not named has no usual size.
        ground_rows_px: Rows [first, stop) that are used of a ground image of a given height and width.
    """

    usual_sizes_px: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    ground_rows_px: Mapping[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
