"""Measure a checkpoint's recall on a manifest.

python -m jobs.evaluate --checkpoint runs/town/checkpoints/epoch-0012 --manifest demo/shards/manifests/0123.parquet
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cvft.errors import ConfigError
from jobs import entry
from jobs.config import read_overrides
from pipeline.evaluation import Evaluation, evaluate_checkpoint


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is measured on what."""
    parser.add_argument("--checkpoint", required=True, help="path or URI of a checkpoint")
    parser.add_argument("--manifest", required=True, help="path or URI of the manifest that `shard` printed")
    parser.add_argument("--split", default="val", help="which pairs (default: val)")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs embedded at a time")
    parser.add_argument("--threads", type=int, default=2, help="decoding threads")
    parser.add_argument("--allow-other-preprocess", action="store_true", help="accept other input than trained with")
    parser.add_argument("overrides", nargs="*", metavar="preprocess.key=value", help="change the input preparation")


def run(arguments: argparse.Namespace) -> Evaluation:
    """Evaluate as the arguments say."""
    overrides = read_overrides(arguments.overrides)
    if unknown := sorted(overrides.keys() - {"preprocess"}):
        raise ConfigError(f"{unknown[0]}: only preprocess.* can be changed here; the rest is the checkpoint's own")
    changes = overrides.get("preprocess", {})
    if not isinstance(changes, dict):
        raise ConfigError(f"preprocess: expected preprocess.key=value, got preprocess={changes!r}")
    return evaluate_checkpoint(
        arguments.checkpoint,
        arguments.manifest,
        split=arguments.split,
        preprocess_changes=changes,
        allow_other_preprocess=arguments.allow_other_preprocess,
        batch_size=arguments.batch_size,
        num_threads=arguments.threads,
    )


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    found = run(arguments)
    entry.LOGGER.info("\n%s", recall_table(found.result.metrics(), found.result.one_percent_k))
    return {
        **found.result.metrics(),
        "one_percent": found.result.one_percent,
        "checkpoint": arguments.checkpoint,
        "step": found.info.step,
        "manifest": arguments.manifest,
        "digest": found.dataset.manifest.digest,
        "split": arguments.split,
    }


def recall_table(metrics: dict[str, float], one_percent_k: int) -> str:
    """Return the recalls beside chance as a table for people."""
    num_references = int(metrics["num_references"])
    rows = [("R@1", 1, "recall_at_1"), ("R@5", 5, "recall_at_5"), ("R@10", 10, "recall_at_10")]
    rows.append((f"R@1% (k={one_percent_k})", one_percent_k, "recall_at_1_percent"))
    lines = [f"  {int(metrics['num_queries'])} queries among {num_references} references"]
    lines += [
        f"  {name:14} {100 * metrics[key]:6.2f} %   chance {100 * min(k / num_references, 1.0):6.2f} %"
        for name, k, key in rows
    ]
    return "\n".join(lines)


JOB = entry.Job(
    name="evaluate",
    summary="Measure a checkpoint's recall on a split of a manifest; equal scores count against the query.",
    example="cvft evaluate --checkpoint $(ls -d demo/runs/town-*/checkpoints/* | tail -1)"
    " --manifest $(ls demo/shards/manifests/*.parquet)",
    add_arguments=add_evaluation_arguments,
    run=_run,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
