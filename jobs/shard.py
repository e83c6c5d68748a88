"""Write raw pairs to WebDataset shards with a manifest, on Ray.

python -m jobs.shard --root CVUSA --store s3://bucket/cvusa
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from typing import Any

from cvft.config import PreprocessConfig
from cvft.errors import ConfigError
from jobs import entry
from jobs.cluster import ray_session_with_room
from jobs.metrics import ShardingMetrics
from jobs.node_labels import add_node_label, parse_labels
from jobs.validate import add_source_arguments
from pipeline.build import BuildOptions, build_shards
from pipeline.plan import Cut
from pipeline.profile import ORIGINAL, ShardProfile, preresized
from pipeline.ray_tasks import OnRay
from pipeline.shard_work import BuildProgress

_NUM_NAMED = 100
_SIZE = re.compile(r"(\d+)x(\d+)")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    parser.add_argument("--store", required=True, help="folder or s3://bucket/prefix that the shards are written to")
    parser.add_argument("--pairs-per-shard", type=int, default=1000, help="pairs in a shard (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the permutation that mixes pairs over shards")
    parser.add_argument("--window", type=int, help="tasks in flight (default: twice the cluster's CPUs)")
    add_node_label(parser)
    parser.add_argument("--no-image-check", action="store_true", help="do not decode each image before writing it")
    parser.add_argument("--skip-unusable", action="store_true", help="leave unusable pairs out, named in the manifest")
    parser.add_argument("--exclude", metavar="FILE", help="keys to leave out, as `validate --fix-list` writes")
    parser.add_argument("--rebuild", action="store_true", help="cut all pairs anew, whatever the store holds of them")
    profile = parser.add_argument_group("what the shards' images are")
    profile.add_argument(
        "--profile", choices=("original", "preresized"), default="original", help="the files, or JPEGs at input size"
    )
    profile.add_argument("--ground-size", metavar="HxW", help="of preresized ground images (default: 112x616)")
    profile.add_argument("--aerial-size", metavar="HxW", help="of preresized aerial images (default: 256x256)")


def _profile(arguments: argparse.Namespace) -> ShardProfile:
    sizes = {"--ground-size": arguments.ground_size, "--aerial-size": arguments.aerial_size}
    if arguments.profile == "original":
        for name, text in sizes.items():
            if text is not None:
                raise ConfigError(f"{name} {text}: original images keep their sizes; add --profile preresized")
        return ORIGINAL
    usual = PreprocessConfig()
    return preresized(
        _size("--ground-size", arguments.ground_size) or usual.ground_size_px,
        _size("--aerial-size", arguments.aerial_size) or usual.aerial_size_px,
    )


def _size(name: str, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ConfigError(f"{name} {text}: must be height x width, such as 112x616")
    return int(found[1]), int(found[2])


class ShardingProgress:
    """Tells how far the writing of shards is."""

    def __init__(self) -> None:
        self._line = entry.Progress("sharding")
        self._metrics = ShardingMetrics()

    def __call__(self, now: BuildProgress) -> None:
        """Tell it, as often as a terminal or a log wants to know."""
        megabytes_per_s = now.num_bytes_written / 1e6 / self._line.seconds
        details = f"{now.num_shards_done:,}/{now.num_shards:,} shards, {megabytes_per_s:,.1f} MB/s"
        if now.num_pairs_found:
            details += f", {now.num_pairs_found:,} pairs found finished"
        if now.num_retries:
            details += f", {now.num_retries} retries"
        self._metrics.show(now)
        self._line(now.num_pairs_done, now.num_pairs, before=now.num_pairs_found, details=details)


def _checked(arguments: argparse.Namespace) -> tuple[BuildOptions, dict[str, str]]:
    options = BuildOptions(
        layout=arguments.layout,
        split=arguments.split,
        cut=Cut(pairs_per_shard=arguments.pairs_per_shard, seed=arguments.seed, profile=_profile(arguments)),
        check_images=not arguments.no_image_check,
        skip_unusable=arguments.skip_unusable,
        exclude=arguments.exclude,
        rebuild=arguments.rebuild,
    )
    return options, parse_labels(arguments.node_label, option="--node-label")


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    _checked(arguments)
    return entry.plain(arguments)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    options, labels = _checked(arguments)
    session = partial(ray_session_with_room, what="shard", labels=labels)
    runner = OnRay(window=arguments.window, session=session, labels=labels)
    made = build_shards(arguments.root, arguments.store, options, runner=runner, progress=ShardingProgress())
    for problem in made.excluded[:_NUM_NAMED]:
        entry.LOGGER.warning("left out: %s", problem)
    if len(made.excluded) > _NUM_NAMED:
        entry.LOGGER.warning("and %d more, all named in the manifest", len(made.excluded) - _NUM_NAMED)
    return {
        "manifest": made.manifest,
        "digest": made.digest,
        "generation": made.generation,
        "layout": made.layout,
        "profile": str(options.cut.profile),
        "pairs": made.num_pairs,
        "shards": made.num_shards,
        "bytes": made.num_bytes,
        "seconds": round(made.seconds, 3),
        "shards_written": made.num_written,
        "retries": made.num_retries,
        "changes": dict(made.changes),
        "problems": dict(made.problems),
        "left_out": len(made.excluded),
    }


JOB = entry.Job(
    name="shard",
    summary="Write raw pairs to WebDataset shards with a manifest; started again, it writes only what is missing.",
    example="cvft shard --root demo/town --store shards",
    add_arguments=_add_arguments,
    run=_run,
    resolve=_resolve,
    state="the folder",
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
