"""What a manifest's dataset is, in numbers: pairs, shards, bytes, image sizes, places, leaks, exclusions."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.geography import NeighbourTree, extent, is_located
from pipeline.leaks import find_leaks
from pipeline.manifest import Manifest
from pipeline.pointer import read_pointer
from pipeline.schema import ROLES, TRAIN
from pipeline.sources.base import count_kinds
from pipeline.storage import Store


def manifest_statistics(manifest: Manifest) -> dict[str, Any]:
    """Count a dataset from its manifest alone, no shard is opened; plain JSON data.

    Besides what the names say: `generation` is the dataset's if this manifest is its newest, else None; `nearest_m` is
    the median over located pairs of the distance to the split's nearest other pair; `leaks` counts the queries of every
    other split that share bytes or place with a pair of `train`, None where there is no such split.

    Raises:
        ShardError: The dataset's pointer is damaged.
        StoreError: The store cannot be read.
    """
    pointer = read_pointer(Store.from_uri(manifest.store_uri))
    is_newest = pointer is not None and pointer.digest == manifest.digest
    return {
        "manifest": manifest.uri,
        "digest": manifest.digest,
        "generation": pointer.generation if pointer is not None and is_newest else None,
        "layout": manifest.layout,
        "profile": manifest.profile.plain(),
        "pairs": manifest.pairs.num_rows,
        "shards": len(manifest.shards),
        "bytes": sum(shard.num_bytes for shard in manifest.shards),
        "splits": {split: _split_statistics(manifest, split) for split in manifest.splits},
        "excluded": count_kinds(manifest.excluded),
    }


def _split_statistics(manifest: Manifest, split: str) -> dict[str, Any]:
    rows = manifest.split(split)
    location_m = manifest.location_m(split)
    shards = [manifest.shards[number] for number in pc.unique(rows["shard"]).to_pylist()]
    leaks = find_leaks(manifest.pairs, split, train_split=TRAIN)
    degrees = (rows[name].to_numpy(zero_copy_only=False) for name in ("latitude_deg", "longitude_deg"))
    box = extent(*degrees)
    return {
        "pairs": rows.num_rows,
        "shards": len(shards),
        "bytes": sum(shard.num_bytes for shard in shards),
        "image_bytes": {role: pc.sum(rows[f"{role}_bytes"]).as_py() for role in ROLES},
        "sizes_px": {role: _sizes(rows, role) for role in ROLES},
        "located": int(is_located(location_m).sum()),
        "locations": pc.count_distinct(rows["location_id"]).as_py(),
        "extent": None if box is None else asdict(box),
        "nearest_m": _median_nearest_m(location_m),
        "leaks": leaks.num_leaked,
    }


def _sizes(rows: pa.Table, role: str) -> dict[str, int]:
    """Return how many images have which width and height, the most frequent first."""
    sizes = zip(rows[f"{role}_width_px"].to_pylist(), rows[f"{role}_height_px"].to_pylist(), strict=True)
    return {f"{width}x{height}": count for (width, height), count in Counter(sizes).most_common()}


def _median_nearest_m(location_m: np.ndarray) -> float | None:
    distance_m = NeighbourTree(location_m).nearest_others(1).distance_m
    known = distance_m[np.isfinite(distance_m)]
    return float(np.median(known)) if len(known) else None
