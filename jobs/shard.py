"""Write raw pairs to WebDataset shards with a manifest, on Ray.

python -m jobs.shard --root CVUSA --store s3://bucket/cvusa
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jobs import entry
from jobs.cluster import ray_session
from jobs.validate import add_source_arguments
from pipeline.build import ShardResult, build_shards


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    parser.add_argument("--store", required=True, help="folder or s3://bucket/prefix that the shards are written to")
    parser.add_argument("--pairs-per-shard", type=int, default=1000, help="pairs in a shard (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the permutation that mixes pairs over shards")
    parser.add_argument("--window", type=int, help="tasks in flight (default: twice the cluster's CPUs)")
    parser.add_argument("--no-image-check", action="store_true", help="do not decode each image before writing it")
    parser.add_argument("--skip-unusable", action="store_true", help="leave unusable pairs out, named in the manifest")


def run(arguments: argparse.Namespace) -> ShardResult:
    """Shard as the arguments say, on a Ray that is there or started for it."""
    return build_shards(
        arguments.root,
        arguments.store,
        layout=arguments.layout,
        split=arguments.split,
        pairs_per_shard=arguments.pairs_per_shard,
        seed=arguments.seed,
        window=arguments.window,
        check_images=not arguments.no_image_check,
        skip_unusable=arguments.skip_unusable,
        progress=entry.Progress("sharding"),
        ray_session=ray_session,
    )


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    made = run(arguments)
    for problem in made.excluded:
        entry.LOGGER.warning("left out: %s", problem)
    return {
        "manifest": made.manifest,
        "digest": made.digest,
        "layout": made.layout,
        "pairs": made.num_pairs,
        "shards": made.num_shards,
        "bytes": made.num_bytes,
        "seconds": round(made.seconds, 3),
        "shards_written": made.num_written,
        "problems": dict(made.problems),
        "left_out": len(made.excluded),
    }


JOB = entry.Job(
    name="shard",
    summary="Write raw pairs to WebDataset shards with a manifest; started again, it writes only what is missing.",
    example="cvft shard --root demo/town --store shards",
    add_arguments=_add_arguments,
    run=_run,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
