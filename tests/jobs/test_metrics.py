"""What a job shows on Ray's metrics endpoints: told to a real Ray, and to none."""

from __future__ import annotations

import time
from dataclasses import fields

import pytest
import torch

from cvft.engine import StepReport
from jobs import metrics
from jobs.tracked import StepMetrics
from pipeline.cache import CacheStats
from pipeline.shard_work import BuildProgress


class _Told:
    """Stands for one of Ray's metrics and remembers what it was told."""

    def __init__(self) -> None:
        self.values: list[tuple[float, dict[str, str]]] = []

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values.append((value, tags or {}))

    inc = set


@pytest.fixture
def told(monkeypatch):
    """Everything that is told, by name, as if Ray ran."""
    made: dict[str, _Told] = {}
    monkeypatch.setattr(metrics, "_metric", lambda name: made.setdefault(name, _Told()))
    monkeypatch.setattr(metrics.ray, "is_initialized", lambda: True)
    return made


def test_without_ray_nothing_is_made_or_told(monkeypatch):
    monkeypatch.setattr(metrics.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(metrics, "_metric", lambda name: pytest.fail(f"{name} was made"))
    training = metrics.TrainingMetrics("town")
    training.add_step(32)
    training.show({"train/loss": 0.5}, step=10)
    training.close()
    metrics.CacheMetrics("town", 0).show(CacheStats(num_hits=3))
    metrics.ShardingMetrics().show(_progress(4))


@pytest.mark.ray
def test_every_metric_is_one_that_ray_takes(ray_cluster):
    for name, (kind, labels, _) in metrics.METRICS.items():
        tags = dict.fromkeys(labels, "a")
        metric = metrics._metric(name)
        metric.set(1.0, tags=tags) if kind == "gauge" else metric.inc(1.0, tags=tags)


def test_what_mlflow_is_told_is_shown_under_its_name_here(told):
    training = metrics.TrainingMetrics("town")
    training.show({"train/loss": 0.5, "recall_at_1": 0.25, "unknown": 1.0}, step=10)
    training.close()
    assert told["cvft_train_loss"].values[0] == (0.5, {"run": "town"})
    assert told["cvft_recall_at_1"].values[0] == (0.25, {"run": "town"})
    assert told["cvft_train_step"].values[0] == (10, {"run": "town"})
    assert set(told) <= set(metrics.METRICS)


def test_what_is_shown_is_what_mlflow_is_told_of_steps_and_evaluations():
    logged: dict[str, float] = {}
    steps = StepMetrics(lambda numbers, *, step: logged.update(numbers), every=1, device=torch.device("cpu"))
    report = StepReport(
        step=0, loss=0.5, gradient_norm=1.0, learning_rate=0.1, step_s=0.1, data_wait_s=0.0, pairs_per_s=320.0
    )
    steps.add(report)
    of_evaluations = {"epoch", "recall_at_1", "recall_at_5", "recall_at_10"}
    assert set(metrics.FROM_MLFLOW) == set(metrics.FROM_MLFLOW) & logged.keys() | of_evaluations


def test_a_gauge_is_told_again_until_it_is_closed(told, monkeypatch):
    monkeypatch.setattr(metrics, "_REFRESH_S", 0.01)
    with metrics.Gauges(run="town") as gauges:
        gauges.set({"cvft_recall_at_1": 0.5})
        while len(told["cvft_recall_at_1"].values) < 3:
            time.sleep(0.005)
    count = len(told["cvft_recall_at_1"].values)
    time.sleep(0.05)
    assert len(told["cvft_recall_at_1"].values) == count


def test_counters_are_told_what_was_added_since(told):
    cache = metrics.CacheMetrics("town", 1)
    stats = CacheStats(num_hits=1, num_misses=3, num_bytes=100)
    cache.show(stats)
    stats.num_hits = 5
    cache.show(stats)
    cache.show(stats)
    labels = {"run": "town", "world_rank": "1"}
    assert told["cvft_cache_hits"].values == [(1, labels), (4, labels)]
    assert told["cvft_cache_misses"].values == [(3, labels)]
    names = {f"cvft_cache_{field.name.removeprefix('num_')}" for field in fields(CacheStats)}
    assert names <= set(metrics.METRICS)


def test_shards_that_an_earlier_job_finished_are_no_throughput(told):
    sharding = metrics.ShardingMetrics()
    sharding.show(_progress(2))
    sharding.show(_progress(6))
    assert sum(value for value, _ in told["cvft_shard_pairs"].values) == 40
    assert [value for value, _ in told["cvft_shard_shards_done"].values] == [2, 6]


def _progress(num_shards_done: int) -> BuildProgress:
    return BuildProgress(
        num_pairs=100,
        num_pairs_done=10 * num_shards_done,
        num_pairs_found=20,
        num_shards=10,
        num_shards_done=num_shards_done,
        num_bytes_written=1000 * num_shards_done,
        num_retries=0,
    )
