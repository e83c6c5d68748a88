"""Measure a checkpoint's recall on a manifest.

python -m jobs.evaluate --checkpoint runs/town/checkpoints/step-00000720 --manifest demo/shards/manifests/0123.parquet
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from cvft.augment import AugmentConfig
from cvft.errors import ConfigError
from jobs import entry, metrics
from jobs.cluster import on_a_node
from jobs.config import read_overrides
from jobs.models import is_registered, named_checkpoint
from jobs.node_labels import add_node_label, parse_labels
from jobs.tracking_config import default_uri
from pipeline.evaluation import Evaluation, evaluate_checkpoint
from pipeline.report.charts import RECALLS

_HIT_DISTANCE_HELP = "also report recall with any reference nearer than M metres as right (5 for CVACT_test)"

_FOV_HELP = (
    "keep so much of each panorama, blank the rest; at drawn bearings, or in the middle if orientation is unknown"
)


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is measured on what."""
    what = "path or URI of a checkpoint, or models:/NAME@ALIAS or models:/NAME/VERSION of a registered model"
    parser.add_argument("--checkpoint", required=True, help=what)
    parser.add_argument(
        "--tracking-uri", default=default_uri(), help="where MLflow keeps registered models (default: %(default)s)"
    )
    parser.add_argument("--manifest", required=True, help="path or URI of the store, or of one of its manifests")
    parser.add_argument("--split", default="val", help="which pairs (default: val)")
    parser.add_argument("--train-split", default="train", help="split that leaks are counted against (default: train)")
    parser.add_argument("--hit-distance", type=float, metavar="M", help=_HIT_DISTANCE_HELP)
    parser.add_argument("--batch-size", type=int, default=32, help="pairs embedded at a time")
    parser.add_argument("--threads", type=int, default=2, help="decoding threads")
    parser.add_argument("--fov", type=float, default=360.0, metavar="DEG", help=_FOV_HELP)
    parser.add_argument(
        "--unknown-orientation", action="store_true", help="roll each panorama by any number of columns"
    )
    parser.add_argument("--view-seed", type=int, default=0, help="draws the two of these, pair by pair (default: 0)")
    parser.add_argument("--allow-other-preprocess", action="store_true", help="accept other input than trained with")
    parser.add_argument("overrides", nargs="*", metavar="preprocess.key=value", help="change the input preparation")


class EmbeddingProgress:
    """Tells how many pairs of a split are embedded."""

    def __init__(self) -> None:
        self._line = entry.Progress("embedding")
        self._num_told = 0

    def __call__(self, done: int, total: int) -> None:
        """Tell it, as often as a terminal or a log wants to know."""
        metrics.add("cvft_evaluate_pairs", done - self._num_told)
        self._num_told = done
        self._line(done, total)


def checked(arguments: argparse.Namespace) -> tuple[dict[str, Any], AugmentConfig]:
    """Return changes to the preprocessing, and how queries are seen.

    Raises:
        ConfigError: An argument is refused.
    """
    overrides = read_overrides(arguments.overrides)
    if unknown := sorted(overrides.keys() - {"preprocess"}):
        raise ConfigError(f"{unknown[0]}: only preprocess.* can be changed here; the rest is the checkpoint's own")
    changes = overrides.get("preprocess", {})
    if not isinstance(changes, dict):
        raise ConfigError(f"preprocess: expected preprocess.key=value, got preprocess={changes!r}")
    if arguments.view_seed < 0:
        raise ConfigError(f"--view-seed {arguments.view_seed}: must not be negative")
    fov_deg = (arguments.fov, arguments.fov)
    return changes, AugmentConfig(fov_deg=fov_deg, is_orientation_unknown=arguments.unknown_orientation)


def run(arguments: argparse.Namespace) -> Evaluation:
    """Evaluate as the arguments say."""
    with named_checkpoint(arguments.checkpoint, arguments.tracking_uri) as (place, _):
        return _evaluate(arguments, place)


def _evaluate(arguments: argparse.Namespace, checkpoint: str) -> Evaluation:
    changes, view = checked(arguments)
    return evaluate_checkpoint(
        checkpoint,
        arguments.manifest,
        split=arguments.split,
        train_split=arguments.train_split,
        hit_distance_m=arguments.hit_distance,
        preprocess_changes=changes,
        allow_other_preprocess=arguments.allow_other_preprocess,
        view=view,
        view_seed=arguments.view_seed,
        batch_size=arguments.batch_size,
        num_threads=arguments.threads,
        progress=EmbeddingProgress(),
    )


def _measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], str, str | None]:
    """Evaluate where this is called; return the result, a table for people, and why leaks are unknown if they are."""
    entry.log_to_stderr()  # a node's process has not been told yet
    with named_checkpoint(arguments.checkpoint, arguments.tracking_uri) as (place, version):
        found = _evaluate(arguments, place)
    result = {
        **found.metrics(),
        "leaked_queries_by": dict(found.queries.leaks.num_by_trait),
        "one_percent": found.result.one_percent,
        "checkpoint": arguments.checkpoint,
        "version": version,
        "step": found.info.step,
        "manifest": arguments.manifest,
        "digest": found.dataset.manifest.digest,
        "split": arguments.split,
        "train_split": arguments.train_split,
        "fov_deg": arguments.fov,
        "is_orientation_unknown": arguments.unknown_orientation,
    }
    return result, recall_table(found.metrics(), found.result.one_percent_k), found.queries.leaks.unknown_because


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_evaluation_arguments(parser)
    parser.add_argument("--use-gpu", action="store_true", help="on a cluster, take a node with a GPU")
    add_node_label(parser)


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    checked(arguments)
    parse_labels(arguments.node_label, option="--node-label")
    return plain(arguments)


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that mean something: only a registered model's name says that MLflow is asked."""
    values = entry.plain(arguments)
    return {key: value for key, value in values.items() if key != "tracking_uri" or is_registered(arguments.checkpoint)}


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    checked(arguments)  # before anything is fetched
    labels = parse_labels(arguments.node_label, option="--node-label")
    what = "--node-label" if labels else "--use-gpu" if arguments.use_gpu else "evaluate"
    result, table, unknown = on_a_node(_measure, arguments, use_gpu=arguments.use_gpu, labels=labels, what=what)
    entry.LOGGER.info("\n%s", table)
    if unknown:
        entry.LOGGER.warning("recall without leaks is unknown: %s", unknown)
    return result


def recall_table(metrics: Mapping[str, float | None], one_percent_k: int) -> str:
    """Return the recalls as a table for people: by exact pair, without leaked queries, by distance, beside chance."""
    num_queries, num_references = (metrics[name] or 0 for name in ("num_queries", "num_references"))
    columns = {"exact pair": "", "de-leaked": "_deleaked"}
    columns |= {
        name.removeprefix("recall_at_1_").replace("_", " "): name.removeprefix("recall_at_1")
        for name in metrics
        if name.startswith("recall_at_1_within_")
    }
    num_leaked = metrics["num_leaked_queries"]
    leaks = "unknown" if num_leaked is None else f"{num_leaked:,.0f}"
    lines = [
        f"  {num_queries:,.0f} queries among {num_references:,.0f} references; in the training split as well: {leaks}",
        f"  {'':14}" + "".join(f" {name:>14}" for name in columns) + "         chance",
    ]
    rows = {"R@1": 1, "R@5": 5, "R@10": 10, f"R@1% (k={one_percent_k})": one_percent_k}
    for (title, k), key in zip(rows.items(), RECALLS, strict=True):
        cells = [metrics[key + suffix] for suffix in columns.values()]
        shown = "".join(f" {'-':>14}" if cell is None else f" {100 * cell:12.2f} %" for cell in cells)
        lines.append(f"  {title:14}{shown} {100 * min(k / num_references, 1.0):12.2f} %")
    return "\n".join(lines)


JOB = entry.Job(
    name="evaluate",
    summary="Measure a checkpoint's recall on a split of a manifest; equal scores count against the query.",
    example="cvft evaluate --checkpoint $(ls -d demo/runs/town-*/checkpoints/* | tail -1)"
    " --manifest $(ls demo/shards/manifests/*.parquet)",
    add_arguments=_add_arguments,
    run=_run,
    resolve=_resolve,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
