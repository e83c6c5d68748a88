"""What a job under way shows on Ray's metrics endpoints, for Prometheus: gauges and counters named `ray_cvft_*`.

Without Ray nothing is shown and nothing is done. Telling one value takes about 4 microseconds; Ray's own
processes export it. `infra/monitoring` draws these names.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import TracebackType
from typing import Any, Literal

import ray
import ray.util.metrics

from pipeline.cache import CacheStats
from pipeline.shard_work import BuildProgress

Kind = Literal["gauge", "counter"]

# name: (kind, labels, text); Ray puts `ray_` before a name and `_total` behind a counter's.
METRICS: dict[str, tuple[Kind, tuple[str, ...], str]] = {
    "cvft_train_start_time_s": ("gauge", ("run",), "When the workers were started, in Unix time; a restart changes it"),
    "cvft_train_steps": ("counter", ("run",), "Steps done by these workers"),
    "cvft_train_pairs": ("counter", ("run",), "Pairs trained on by these workers, all ranks together"),
    "cvft_train_step": ("gauge", ("run",), "Steps done since the beginning of the training"),
    "cvft_train_epoch": ("gauge", ("run",), "Epochs evaluated"),
    "cvft_train_data_wait_share": ("gauge", ("run",), "Share of that time in which rank 0 waited for data"),
    "cvft_train_step_s": ("gauge", ("run",), "Seconds of a step, without waiting for data"),
    "cvft_train_loss": ("gauge", ("run",), "Mean loss of the last interval of steps"),
    "cvft_train_gradient_norm": ("gauge", ("run",), "Mean norm of the gradient, before it is clipped"),
    "cvft_train_learning_rate": ("gauge", ("run",), "Learning rate of the last step"),
    "cvft_train_rss_bytes": ("gauge", ("run",), "Main memory of rank 0"),
    "cvft_recall_at_1": ("gauge", ("run",), "R@1 of the last evaluation, a fraction"),
    "cvft_recall_at_5": ("gauge", ("run",), "R@5 of the last evaluation, a fraction"),
    "cvft_recall_at_10": ("gauge", ("run",), "R@10 of the last evaluation, a fraction"),
    "cvft_cache_hits": ("counter", ("run", "world_rank"), "Shards that were in the node's cache"),
    "cvft_cache_misses": ("counter", ("run", "world_rank"), "Shards fetched from the store"),
    "cvft_cache_bytes": ("counter", ("run", "world_rank"), "Bytes of those"),
    "cvft_cache_evictions": ("counter", ("run", "world_rank"), "Shards removed to make room"),
    "cvft_cache_dropped": ("counter", ("run", "world_rank"), "Damaged shards that were fetched again"),
    "cvft_evaluate_pairs": ("counter", (), "Pairs that `evaluate` embedded"),
    "cvft_shard_pairs": ("counter", (), "Pairs in shards that this job finished"),
    "cvft_shard_bytes": ("counter", (), "Bytes of shards that this job wrote"),
    "cvft_shard_retries": ("counter", (), "Tasks that were tried again"),
    "cvft_shard_shards_done": ("gauge", (), "Finished shards of the plan, those of earlier jobs included"),
    "cvft_shard_shards": ("gauge", (), "Shards of the plan"),
}

# What a training tells MLflow, by its name here.
FROM_MLFLOW = {
    "train/data_wait_share": "cvft_train_data_wait_share",
    "train/step_s": "cvft_train_step_s",
    "train/loss": "cvft_train_loss",
    "train/gradient_norm": "cvft_train_gradient_norm",
    "train/learning_rate": "cvft_train_learning_rate",
    "system/rss_bytes": "cvft_train_rss_bytes",
    "epoch": "cvft_train_epoch",
    "recall_at_1": "cvft_recall_at_1",
    "recall_at_5": "cvft_recall_at_5",
    "recall_at_10": "cvft_recall_at_10",
}

_REFRESH_S = 5.0


@cache
def _metric(name: str) -> Any:
    kind, labels, text = METRICS[name]
    make = ray.util.metrics.Gauge if kind == "gauge" else ray.util.metrics.Counter
    return make(name, description=text, tag_keys=labels)


def add(name: str, amount: float, **labels: str) -> None:
    """Add to a counter."""
    if amount > 0 and ray.is_initialized():
        _metric(name).inc(amount, tags=labels)


class Gauges:
    """Gauges of one job, told again by a thread: Ray forgets a gauge that was not told for two of its intervals (20 s).

    Used as a context manager, or closed by `close`.
    """

    def __init__(self, **labels: str) -> None:
        self._labels = labels
        self._values: dict[str, float] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def set(self, values: Mapping[str, float]) -> None:
        """Show values by name, and go on showing them."""
        if not values or not ray.is_initialized():
            return
        self._values = {**self._values, **values}
        self._tell()
        if self._thread is None:
            self._thread = threading.Thread(target=self._tell_again, name="gauges", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Show them no longer."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _tell(self) -> None:
        for name, value in self._values.items():
            _metric(name).set(value, tags=self._labels)

    def _tell_again(self) -> None:
        while not self._closed.wait(_REFRESH_S) and ray.is_initialized():
            self._tell()

    def __enter__(self) -> Gauges:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class TrainingMetrics:
    """Shows a training; rank 0 alone makes one."""

    def __init__(self, run: str) -> None:
        """Show that the workers of the training of this name have started."""
        self._run = run
        self._gauges = Gauges(run=run)
        self._gauges.set({"cvft_train_start_time_s": time.time()})

    def add_step(self, num_pairs: float) -> None:
        """Count a step on so many pairs."""
        add("cvft_train_steps", 1, run=self._run)
        add("cvft_train_pairs", num_pairs, run=self._run)

    def show(self, numbers: Mapping[str, float], *, step: int) -> None:
        """Show what MLflow is told after so many steps."""
        shown = {name: numbers[key] for key, name in FROM_MLFLOW.items() if key in numbers}
        self._gauges.set({**shown, "cvft_train_step": step})

    def close(self) -> None:
        """Show it no longer."""
        self._gauges.close()


class CacheMetrics:
    """Shows what the cache of shards does for one rank of a training."""

    def __init__(self, run: str, world_rank: int) -> None:
        self._labels = {"run": run, "world_rank": str(world_rank)}
        self._told = CacheStats()

    def show(self, stats: CacheStats) -> None:
        """Count what was done since the last call."""
        if stats == self._told or not ray.is_initialized():
            return
        for field in fields(stats):
            now, before = getattr(stats, field.name), getattr(self._told, field.name)
            add(f"cvft_cache_{field.name.removeprefix('num_')}", now - before, **self._labels)
            setattr(self._told, field.name, now)


class ShardingMetrics:
    """Shows how the writing of shards goes."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def show(self, now: BuildProgress) -> None:
        """Count what was done since the last call, which comes about once a second."""
        if not ray.is_initialized():
            return
        counts = {
            "cvft_shard_pairs": now.num_pairs_done - now.num_pairs_found,
            "cvft_shard_bytes": now.num_bytes_written,
            "cvft_shard_retries": now.num_retries,
        }
        for name, count in counts.items():
            add(name, count - self._told.get(name, 0))
        self._told = counts
        _metric("cvft_shard_shards_done").set(now.num_shards_done)
        _metric("cvft_shard_shards").set(now.num_shards)
