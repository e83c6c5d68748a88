"""Pairs per second of the loader beside the official one, webdataset, litdata and MosaicML streaming.

    make bench-peers                                 # once: the peers' environment, .venv-peers
    python tests/bench/bench_loader.py               # six minutes
    python tests/bench/bench_loader.py --rounds 3    # quicker, noisier

All read the same 2,000 pairs of CVUSA's sizes (the real sample's images in turn where it lies beside the checkout, else
synthetic ones of 61 and 113 KB), from the page cache, in batches of 32 at 112x616 and 256x256. Each contender is a
process of its own that stays; they take turns, one epoch each within a round. The table has the median pairs per second
and the medians of the ratios within a round, so that another process's load hits all alike; beside them
stands the CPU time of a pair, workers included, which does not depend on what else runs.

`official` is the authors' way: loose files, OpenCV, full decode, float32, INTER_AREA, one process. The peers get our
decoder (simplejpeg at half size, OpenCV's linear interpolation) and two workers each, and need not shuffle; ours decode
on two threads and read in random order.

Prints tables and, last, one line of JSON. Exits with 1 if `fast` is not 5 times faster than `official` and 1.5 times
faster than the best peer, or `preresized` not 9 times faster than `official`; with 2 if the peers are not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

ROOT = Path(__file__).parents[2]
PEER_PYTHON = ROOT / ".venv-peers/bin/python"
SAMPLE = ROOT.parent / "shared/real/cvusa_sample"
CONTENDER = Path(__file__).with_name("loader_contender.py")
PEERS = ("webdataset", "litdata", "streaming")
NAMES = ("official", "exact", "fast", "preresized", *PEERS)
SIZES = {"ground": ((224, 1232), 61_000), "aerial": ((750, 750), 113_000)}
TARGETS = (("fast", "official", 5.0), ("preresized", "official", 9.0), ("fast", "best peer", 1.5))


def synthetic_jpeg(size_px: tuple[int, int], num_bytes: int, seed: int) -> bytes:
    """A smooth picture with as much noise as makes a JPEG of about this length."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, size_px[::-1], interpolation=cv2.INTER_CUBIC).astype(np.float32)
    noise = cv2.GaussianBlur(generator.normal(size=(*size_px, 3)).astype(np.float32), (3, 3), 0)
    low, high = 0.0, 200.0
    for _ in range(12):
        amount = (low + high) / 2
        pixels = np.clip(smooth + amount * noise, 0, 255).astype(np.uint8)
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=90, colorsubsampling="420")
        low, high = (low, amount) if len(data) > num_bytes else (amount, high)
    return data


def images(sample: Path) -> dict[str, list[bytes]]:
    folders = {"ground": sample / "streetview/panos", "aerial": sample / "bingmap"}
    if sample.is_dir():
        return {role: [path.read_bytes() for path in sorted(folders[role].rglob("*.jpg"))] for role in SIZES}
    return {
        role: [synthetic_jpeg(size_px, num_bytes, seed) for seed in range(20)]
        for role, (size_px, num_bytes) in SIZES.items()
    }


def write_raw(root: Path, sample: Path, num_pairs: int) -> None:
    """Write a data set in CVUSA's layout, the images repeated; every image is a file of its own."""
    for folder in ("bingmap/19", "streetview/panos", "splits"):
        (root / folder).mkdir(parents=True)
    lines = []
    found = images(sample)
    for number, ground, aerial in zip(range(num_pairs), *map(itertools.cycle, found.values()), strict=False):
        key = f"{number + 1:07d}"
        (root / f"streetview/panos/{key}.jpg").write_bytes(ground)
        (root / f"bingmap/19/{key}.jpg").write_bytes(aerial)
        lines.append(f"bingmap/19/{key}.jpg,streetview/panos/{key}.jpg,streetview/annotations/{key}.png\n")
    (root / "splits/train-19zl.csv").write_text("".join(lines))
    (root / "splits/val-19zl.csv").write_text("")


def shard(folder: Path) -> None:
    for profile in ("original", "preresized"):
        options = ["--root", str(folder / "raw"), "--store", str(folder / profile), "--pairs-per-shard", "250"]
        command = [sys.executable, "-m", "jobs.shard", *options, "--profile", profile]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its living children, Linux alone."""
    with contextlib.suppress(FileNotFoundError):  # a child that has just ended
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ticks = sum(int(fields[number]) for number in (11, 12))  # user, system
        return ticks / os.sysconf("SC_CLK_TCK") + sum(cpu_s(int(child)) for child in children)
    return 0.0


class Contender:
    """A loader's process, which runs an epoch when asked."""

    def __init__(self, name: str, folder: Path) -> None:
        python = PEER_PYTHON if name in PEERS else sys.executable
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        self._log = (folder / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            [str(python), str(CONTENDER), name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._name = name

    def answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._log.close()
            raise RuntimeError(f"{self._name} ended: {Path(self._log.name).read_text()[-2000:]}")
        return json.loads(line)

    def run_epoch(self) -> tuple[float, float]:
        """Pairs per second, and CPU milliseconds per pair of the process and its workers."""
        before = cpu_s(self._process.pid)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found = self.answer()
        return found["pairs"] / found["seconds"], 1e3 * (cpu_s(self._process.pid) - before) / found["pairs"]

    def end(self) -> None:
        self._process.communicate()
        self._log.close()


@contextlib.contextmanager
def contenders(folder: Path) -> Iterator[dict[str, Contender]]:
    running: dict[str, Contender] = {}
    try:
        for name in NAMES:
            running[name] = Contender(name, folder)
            running[name].answer()  # one after another: they write and warm up
        yield running
    finally:
        for contender in running.values():
            contender.end()


def measure(folder: Path, num_rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Pairs per second of each contender in each round, and its median CPU milliseconds per pair."""
    with contenders(folder) as running:
        rounds = [{name: contender.run_epoch() for name, contender in running.items()} for _ in range(num_rounds)]
    speeds = {name: [found[name][0] for found in rounds] for name in NAMES}
    best_peer = max(PEERS, key=lambda name: statistics.median(speeds[name]))
    cpu_ms = {name: round(statistics.median(found[name][1] for found in rounds), 3) for name in NAMES}
    return {**speeds, "best peer": speeds[best_peer]}, cpu_ms


def ratio(speeds: dict[str, list[float]], name: str, other: str) -> float:
    return statistics.median(mine / theirs for mine, theirs in zip(speeds[name], speeds[other], strict=True))


def measure_shares(folder: Path) -> dict[str, dict[str, float]]:
    found = Contender("shares", folder)
    answer = found.answer()
    found.end()
    return answer


def report(speeds: dict[str, list[float]], cpu_ms: dict[str, float], shares: dict[str, dict[str, float]]) -> dict:
    print("loader          pairs/s  min..max        x official  CPU ms/pair")
    for name in NAMES:
        found = speeds[name]
        median, span = statistics.median(found), f"{min(found):.0f}..{max(found):.0f}"
        times = ratio(speeds, name, "official")
        print(f"{name:<14} {median:>8.0f}  {span:<14} {times:>11.2f} {cpu_ms[name]:>12.2f}")
    print("\nCPU ms per pair   read  decode  collate and wait")
    for name, parts in shares.items():
        whole = sum(parts.values())
        print(f"{name:<14}" + "".join(f"{part:>8.3f} ({part / whole:.0%})" for part in parts.values()))
    ratios = {f"{name} / {other}": round(ratio(speeds, name, other), 2) for name, other, _ in TARGETS}
    missed = [
        f"{name} is {ratio(speeds, name, other):.2f} times faster than {other}, not {wanted}"
        for name, other, wanted in TARGETS
        if ratio(speeds, name, other) < wanted
    ]
    medians = {name: round(statistics.median(found), 1) for name, found in speeds.items()}
    numbers = {"pairs_per_s": medians, "cpu_ms": cpu_ms, "ratios": ratios, "shares_ms": shares}
    return {"benchmark": "loader", **numbers, "missed": missed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, one epoch of each loader")
    parser.add_argument("--pairs", type=int, default=2000, help="pairs of an epoch")
    parser.add_argument(
        "--sample", type=Path, default=SAMPLE, help="folder with CVUSA's layout whose images are repeated"
    )
    parser.add_argument("--folder", type=Path, help="keep what the loaders read here and use it again")
    options = parser.parse_args()
    if not PEER_PYTHON.exists():
        sys.stderr.write("the peers are not installed: run `make bench-peers`\n")
        return 2
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-loader-")))
        if not (folder / "raw").exists():
            write_raw(folder / "raw", options.sample, options.pairs)
            shard(folder)
        speeds, cpu_ms = measure(folder, options.rounds)
        result = report(speeds, cpu_ms, measure_shares(folder))
    print(
        json.dumps({**result, "sample": "real" if options.sample.is_dir() else "synthetic", "rounds": options.rounds})
    )
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
