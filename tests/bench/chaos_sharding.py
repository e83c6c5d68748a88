"""Sharding under fire: the driver or a worker is killed (SIGKILL) at seeded moments, and the manifest must not care.

    python tests/bench/chaos_sharding.py --root town --store s3://bucket/chaos --driver-kills 10 --worker-kills 10

First an undisturbed run, then runs that are killed once and, where the driver died, started again. Each run has a
prefix of its own. A run is right when its manifest has the undisturbed run's digest and `verify` finds every pair of it
once, with its bytes. Prints a table and one line of JSON; exits with 1 if a run was not right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.storage import Store

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """One run: who was killed when, what came of it, and what the kill cost."""

    victim: str
    killed_at_s: float
    shards_found: int  # finished shards that the second run found; of all
    shards: int
    digest: str
    num_pairs: int
    total_s: float
    lost_s: float
    is_right: bool


class Sharding:
    """`shard` as a subprocess in a session of its own, whose output is kept."""

    def __init__(self, arguments: list[str]) -> None:
        self.started = time.monotonic()
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        command = [sys.executable, "-m", "jobs.shard", *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=self._output, stderr=self._errors, start_new_session=True
        )

    def wait_until_written(self, store: Store, num_files: int, further_s: float) -> bool:
        """Wait until the store holds so many files, and a moment more; return whether the driver is still running."""
        while self.process.poll() is None and len(store.list()) < num_files:
            time.sleep(0.1)
        time.sleep(further_s)
        return self.process.poll() is None

    def kill_driver(self) -> bool:
        self.process.kill()
        self.process.wait()
        return True

    def kill_worker(self, rng: random.Random) -> bool:
        """Kill one worker that is writing a shard, as soon as there is one."""
        while self.process.poll() is None:
            workers = [pid for pid in _descendants(self.process.pid) if _is_writing(pid)]
            if workers:
                os.kill(rng.choice(workers), signal.SIGKILL)
                return True
            time.sleep(0.01)
        return False

    def result(self) -> dict:
        self.process.wait()
        self._output.seek(0)
        self._errors.seek(0)
        lines = self._output.read().splitlines()
        if self.process.returncode != 0:
            raise SystemExit(f"shard ended with {self.process.returncode}:\n{self._errors.read()}")
        return json.loads(lines[-1])


def _descendants(pid: int) -> list[int]:
    """Return the processes below `pid`, as Linux tells them; those that end meanwhile are left out."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _is_writing(pid: int) -> bool:
    """Tell whether this is a Ray worker with a task of `pipeline.ray_tasks`: Ray names a process after what it does."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_run_later")
    return False


def verify(manifest: str, *further: str) -> dict:
    """Return what `verify` says of every shard, index entry and image of a manifest."""
    command = [sys.executable, "-m", "jobs.verify", "--manifest", manifest, *further]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 2):
        raise SystemExit(f"verify ended with {done.returncode}:\n{done.stderr}")
    return {"code": done.returncode, **json.loads(done.stdout.splitlines()[-1])}


def run_killed(
    arguments: list[str],
    *,
    verify_arguments: list[str],
    store: str,
    victim: str,
    rng: random.Random,
    undisturbed: dict,
    undisturbed_s: float,
) -> Outcome:
    first = Sharding(arguments)
    num_files = rng.randrange(2 * undisturbed["shards"])  # a tar and its sidecar each
    is_hit = first.wait_until_written(Store.from_uri(store), num_files, rng.uniform(0, 1))
    killed_at_s = time.monotonic() - first.started
    if victim == "driver":
        is_hit = is_hit and first.kill_driver()
        made = (Sharding(arguments) if is_hit else first).result()
    else:
        is_hit = is_hit and first.kill_worker(rng)
        made = first.result()
    total_s = time.monotonic() - first.started
    found = verify(made["manifest"], *verify_arguments)
    is_right = made["digest"] == undisturbed["digest"] and found["code"] == 0 and made["pairs"] == undisturbed["pairs"]
    return Outcome(
        victim=victim if is_hit else "none (had ended)",
        killed_at_s=killed_at_s,
        shards_found=made["shards"] - made["shards_written"],
        shards=made["shards"],
        digest=made["digest"],
        num_pairs=made["pairs"],
        total_s=total_s,
        lost_s=total_s - undisturbed_s,
        is_right=is_right,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--pairs-per-shard", type=int, default=25)
    parser.add_argument("--driver-kills", type=int, default=10)
    parser.add_argument("--worker-kills", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="verify each tenth run's bytes, of the others sizes alone")
    parser.add_argument("--seed", type=int, default=0)
    options, further = parser.parse_known_args()  # what is not known here is for `shard`

    def store(number: int) -> str:
        return f"{options.store}/run-{number:02d}"

    def arguments(number: int) -> list[str]:
        size = str(options.pairs_per_shard)
        return ["--root", options.root, "--store", store(number), "--pairs-per-shard", size, *further]

    began = time.monotonic()
    undisturbed = Sharding(arguments(0)).result()
    undisturbed_s = time.monotonic() - began
    is_whole = verify(undisturbed["manifest"])["code"] == 0
    print(f"undisturbed: {undisturbed['digest']}, {undisturbed['pairs']} pairs, {undisturbed_s:.1f} s", flush=True)
    rng = random.Random(options.seed)
    outcomes = []
    for number, victim in enumerate(["driver"] * options.driver_kills + ["worker"] * options.worker_kills, start=1):
        outcome = run_killed(
            arguments(number),
            verify_arguments=["--quick"] if options.quick and number % 10 else [],
            store=store(number),
            victim=victim,
            rng=rng,
            undisturbed=undisturbed,
            undisturbed_s=undisturbed_s,
        )
        outcomes.append(outcome)
        Store.from_uri(store(number)).delete_folder("")
        verdict = "same manifest, whole" if outcome.is_right else f"WRONG: {outcome.digest}"
        print(
            f"{number:3d} {outcome.victim:16} killed at {outcome.killed_at_s:5.1f} s, {outcome.shards_found:3d} of"
            f" {outcome.shards} shards kept, {outcome.total_s:5.1f} s in all, lost {outcome.lost_s:+5.1f} s: {verdict}",
            flush=True,
        )
    summary = {
        "undisturbed_s": round(undisturbed_s, 1),
        "digest": undisturbed["digest"],
        "pairs": undisturbed["pairs"],
        "right": sum(outcome.is_right for outcome in outcomes),
        "runs": len(outcomes),
        "median_lost_s": {
            victim: round(statistics.median(o.lost_s for o in outcomes if o.victim == victim), 1)
            for victim in sorted({outcome.victim for outcome in outcomes})
        },
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    print(json.dumps(summary))
    return 0 if is_whole and summary["right"] == summary["runs"] else 1


if __name__ == "__main__":
    sys.exit(main())
