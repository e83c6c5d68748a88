"""Pairs per CPU second when shards are written, beside webdataset's ShardWriter and a plain copy of the same files.

    python tests/bench/bench_sharding.py                       # images made here, 61 KB ground and 113 KB aerial
    python tests/bench/bench_sharding.py --root CVUSA          # pairs of one's own, repeated up to --pairs
    python tests/bench/bench_sharding.py --rounds 3 --pairs 500  # quicker, noisier

All take turns within a round, in one process, on files that are in the page cache, each into a new folder that is gone
before the next turn. The clock is the process's CPU time (user and system), which leaves out what other processes were
given; the table has medians. `floor` does only what cannot be left out: it reads each file at once, hashes the bytes as
a shard's manifest has them (XXH3, BLAKE3) and writes them at once, without headers, checks or rows.

Then memory: the resident set of one process after each of 20 shards; its growth after the fifth is printed.

Prints a table and, last, one line of JSON. Exits with 1 if fewer than 4,000 pairs per CPU second are written without
image checks or fewer than 450 with them, or if memory grows by more than 16 MB. The speeds hold for a quiet core; where
`floor` itself is slower than 5,000 the machine is too slow or too busy to say anything, which is told.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import webdataset
import xxhash
from blake3 import blake3

from pipeline.schema import PairSource
from pipeline.shards import ShardSpec, write_shard
from pipeline.sources.base import SourceScan
from pipeline.sources.detect import open_source
from pipeline.storage import Store

TARGETS = {"ours": 4000, "ours, decode check": 450}
MIN_FLOOR = 5000
MAX_GROWTH_BYTES = 16 * 1024 * 1024
NUM_SHARDS = 4
KINDS = {"streetview/panos": ((224, 1232), 61_000), "bingmap/19": ((750, 750), 113_000)}
NUM_PICTURES = 8


def make_jpeg(size_px: tuple[int, int], num_bytes: int, seed: int) -> bytes:
    """Return a photo-like JPEG of about that length: noise on smooth colours, as much as it takes."""
    generator = np.random.default_rng(seed)
    smooth = cv2.resize(generator.integers(0, 256, (8, 12, 3), dtype=np.uint8), size_px[::-1]).astype(np.float32)
    noise = cv2.GaussianBlur(generator.normal(0, 1, (*size_px, 3)).astype(np.float32), (0, 0), 0.8)
    low, high = 0.0, 200.0
    for _ in range(12):
        middle = (low + high) / 2
        pixels = np.clip(smooth + middle * noise, 0, 255).astype(np.uint8)
        data = simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420")
        low, high = (middle, high) if len(data) < num_bytes else (low, middle)
    return data


def write_pairs(root: Path, num_pairs: int, source: Path | None) -> SourceScan:
    """Write a dataset in CVUSA's layout: pictures made here, or those of another one, repeated."""
    pictures: dict[str, list[bytes]] = {}
    for folder, (size_px, num_bytes) in KINDS.items():
        (root / folder).mkdir(parents=True)
        files = sorted((source / folder).glob("*.jpg")) if source else []
        pictures[folder] = [file.read_bytes() for file in files] or [
            make_jpeg(size_px, num_bytes, seed) for seed in range(NUM_PICTURES)
        ]
    (root / "splits").mkdir()
    lines = []
    for number in range(1, num_pairs + 1):
        for folder, images in pictures.items():
            (root / folder / f"{number:07d}.jpg").write_bytes(images[number % len(images)])
        lines.append("{1}/{0}.jpg,{2}/{0}.jpg,none\n".format(f"{number:07d}", "bingmap/19", "streetview/panos"))
    (root / "splits/train-19zl.csv").write_text("".join(lines))
    (root / "splits/val-19zl.csv").write_text("")
    return open_source(root)


def specs_of(scan: SourceScan, *, check_images: bool) -> list[ShardSpec]:
    size = -(-len(scan.pairs) // NUM_SHARDS)
    return [
        ShardSpec(
            name=f"shards/train-{number:05d}.tar",
            root=scan.root,
            pairs=scan.pairs[number * size : (number + 1) * size],
            rules=scan.rules,
            check_images=check_images,
        )
        for number in range(NUM_SHARDS)
    ]


def ours(scan: SourceScan, *, check_images: bool) -> Callable[[Path], None]:
    def run(out: Path) -> None:
        store = Store.from_uri(out)
        for spec in specs_of(scan, check_images=check_images):
            entry = write_shard(spec, store)
            assert entry.info.num_pairs == len(spec.pairs)

    return run


def shard_writer(scan: SourceScan) -> Callable[[Path], None]:
    root = Path(scan.root.uri)

    def run(out: Path) -> None:
        out.mkdir()
        count = -(-len(scan.pairs) // NUM_SHARDS)
        with webdataset.ShardWriter(f"{out}/%05d.tar", maxcount=count, verbose=0, mtime=0) as writer:
            for pair in scan.pairs:
                facts = {"key": pair.key, "split": pair.split, "location_id": pair.location_id}
                ground, aerial = ((root / path).read_bytes() for path in (pair.ground, pair.aerial))
                writer.write({"__key__": pair.key, "ground.jpg": ground, "aerial.jpg": aerial, "json": facts})

    return run


def plain_copy(scan: SourceScan) -> Callable[[Path], None]:
    def run(out: Path) -> None:
        out.mkdir()
        for pair in scan.pairs:
            for path in (pair.ground, pair.aerial):
                shutil.copyfile(f"{scan.root.uri}/{path}", out / path.replace("/", "-"))

    return run


def floor(scan: SourceScan) -> Callable[[Path], None]:
    def read(path: str) -> bytes:
        descriptor = os.open(f"{scan.root.uri}/{path}", os.O_RDONLY)
        data = os.read(descriptor, os.fstat(descriptor).st_size)
        os.close(descriptor)
        return data

    def write(out: Path, pairs: list[PairSource]) -> None:
        content = blake3()
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT)
        for pair in pairs:
            data = read(pair.ground) + read(pair.aerial)
            xxhash.xxh3_128_hexdigest(data)
            content.update(data)
            os.write(descriptor, data)
        os.fsync(descriptor)
        os.close(descriptor)

    def run(out: Path) -> None:
        out.mkdir()
        for spec in specs_of(scan, check_images=False):
            write(out / spec.name.rpartition("/")[2], list(spec.pairs))

    return run


def measure(ways: dict[str, Callable[[Path], None]], scan: SourceScan, *, rounds: int, scratch: Path) -> dict:
    """Return the median of pairs per CPU second of each, and the median ratio to `floor` within a round."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            out = scratch / "out"
            gc.collect()
            started = time.process_time()
            run(out)
            seconds = time.process_time() - started
            shutil.rmtree(out)
            if number:  # the first round warms up
                rates[name].append(len(scan.pairs) / seconds)
    return {
        name: {
            "pairs_per_cpu_s": statistics.median(values),
            "best": max(values),
            "of_floor": statistics.median(a / b for a, b in zip(values, rates["floor"], strict=True)),
        }
        for name, values in rates.items()
    }


def growth_bytes(scan: SourceScan, scratch: Path, num_shards: int = 20) -> int:
    """Return how much the resident set grows from the fifth shard to the last; each is larger than the one before."""
    page = os.sysconf("SC_PAGE_SIZE")
    sizes = []
    spec = specs_of(scan, check_images=True)[0]
    for number in range(num_shards):
        pairs = spec.pairs[: len(spec.pairs) * (number + 1) // num_shards]
        write_shard(dataclasses.replace(spec, pairs=pairs), Store.from_uri(scratch / "out"))
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
    shutil.rmtree(scratch / "out")
    return max(sizes[5:]) - sizes[4]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="a dataset in CVUSA's layout whose images are used")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder for the files (default: the system's)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        scan = write_pairs(scratch / "raw", arguments.pairs, arguments.root)
        ways = {
            "floor": floor(scan),
            "ours": ours(scan, check_images=False),
            "ours, decode check": ours(scan, check_images=True),
            "webdataset ShardWriter": shard_writer(scan),
            "plain copy": plain_copy(scan),
        }
        found = measure(ways, scan, rounds=arguments.rounds, scratch=scratch)
        growth = growth_bytes(scan, scratch)
        num_bytes = sum(pair.ground_status.num_bytes + pair.aerial_status.num_bytes for pair in scan.pairs)
    print(f"{len(scan.pairs)} pairs of {num_bytes / len(scan.pairs) / 1000:.0f} KB, {arguments.rounds} rounds")
    print(f"{'':26}{'pairs / CPU s':>14}{'best':>9}{'of floor':>10}{'target':>9}")
    for name, row in found.items():
        target = TARGETS.get(name, "")
        print(f"{name:26}{row['pairs_per_cpu_s']:14,.0f}{row['best']:9,.0f}{row['of_floor']:10.2f}{target:>9}")
    print(f"memory: {growth / 1e6:+.1f} MB from the fifth to the twentieth shard")
    missed = [name for name, target in TARGETS.items() if found[name]["pairs_per_cpu_s"] < target]
    missed += ["memory"] if growth > MAX_GROWTH_BYTES else []
    if missed and found["floor"]["pairs_per_cpu_s"] < MIN_FLOOR:
        print(f"this machine is too slow or too busy: floor is below {MIN_FLOOR:,}")
    print(json.dumps({"pairs": len(scan.pairs), "growth_bytes": growth, "missed": missed, **found}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
