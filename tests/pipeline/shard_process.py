"""A process that shards without Ray, for test_faults.py: ROOT STORE PAIRS_PER_SHARD BARRIER NUM_PROCESSES.

Having planned and written its first shard it waits, by files in the folder BARRIER, until so many processes are there.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from jobs import entry
from pipeline.build import BuildOptions, build_shards
from pipeline.plan import Cut
from pipeline.runner import Here


def main() -> int:
    root, store, pairs_per_shard, barrier, num_processes = sys.argv[1:]

    def wait_for_the_others(_: object) -> None:
        (Path(barrier) / str(os.getpid())).touch()
        while len(list(Path(barrier).iterdir())) < int(num_processes):
            time.sleep(0.01)

    def run(_: object) -> dict[str, object]:
        options = BuildOptions(cut=Cut(pairs_per_shard=int(pairs_per_shard)))
        made = build_shards(root, store, options, runner=Here(), progress=wait_for_the_others)
        return {"digest": made.digest, "generation": made.generation}

    job = entry.Job(
        name="shard", summary="", example="", add_arguments=lambda parser: None, run=run, resolve=entry.plain
    )
    return entry.main(job, [])


if __name__ == "__main__":
    sys.exit(main())
