"""Small raw datasets in the layouts that users have, made of smooth random pictures."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.build import BuildOptions, build_shards
from pipeline.images import encode_jpeg
from pipeline.manifest import Manifest
from pipeline.plan import Cut
from pipeline.profile import ORIGINAL, ShardProfile
from pipeline.runner import Here

GROUND_PX = (56, 308)  # a quarter of CVUSA's sides
AERIAL_PX = (187, 187)


def random_jpeg(size_px: tuple[int, int], seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return encode_jpeg(cv2.resize(coarse, size_px[::-1], interpolation=cv2.INTER_CUBIC))


def write_cvusa(root: Path, *, num_train: int, num_val: int) -> Path:
    """Write a dataset in CVUSA's layout whose all.csv lies a few metres around Helsinki, one row for each id."""
    for folder in ("bingmap/19", "streetview/panos", "splits", "split_locations"):
        (root / folder).mkdir(parents=True)
    ids = [f"{number:07d}" for number in range(1, num_train + num_val + 1)]
    for number, key in enumerate(ids):
        (root / f"bingmap/19/{key}.jpg").write_bytes(random_jpeg(AERIAL_PX, 2 * number))
        (root / f"streetview/panos/{key}.jpg").write_bytes(random_jpeg(GROUND_PX, 2 * number + 1))
    for split, part in (("train", ids[:num_train]), ("val", ids[num_train:])):
        rows = [f"bingmap/19/{key}.jpg,streetview/panos/{key}.jpg,streetview/annotations/{key}.png\n" for key in part]
        (root / f"splits/{split}-19zl.csv").write_text("".join(rows))
    places = [f"0.0,0.0,{60.2 + n * 1e-4:.6f},{24.9 + n * 2e-4:.6f},{n % 360}.5\n" for n in range(len(ids))]
    (root / "split_locations/all.csv").write_text("".join(places))
    return root


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def shard_here(
    root: Path,
    store_uri: str,
    *,
    pairs_per_shard: int = 4,
    seed: int = 0,
    profile: ShardProfile = ORIGINAL,
    **options: Any,
) -> Manifest:
    """Shard without Ray: the same plan, the same shards, the same manifest."""
    cut = Cut(pairs_per_shard=pairs_per_shard, seed=seed, profile=profile)
    return Manifest.load(build_shards(root, store_uri, BuildOptions(cut=cut, **options), runner=Here()).manifest)


@pytest.fixture
def cvusa(tmp_path: Path) -> Path:
    return write_cvusa(tmp_path / "raw", num_train=11, num_val=5)


@pytest.fixture
def make_cvusa() -> Callable[..., Path]:
    return write_cvusa


@pytest.fixture
def make_jpeg() -> Callable[[tuple[int, int], int], bytes]:
    return random_jpeg


@pytest.fixture
def make_table() -> Callable[[Path, list[dict[str, str]]], Path]:
    return write_table


@pytest.fixture
def make_shards() -> Callable[..., Manifest]:
    return shard_here
