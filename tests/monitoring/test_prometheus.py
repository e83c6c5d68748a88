"""Every panel of the dashboard and every alert, asked of a real Prometheus while real jobs run on a real Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from ray.util.state import list_actors

from tests.infra import monitoring_files as files
from tests.monitoring.conftest import ROOT, Cluster, Prometheus

# Where there is no GPU, what Ray tells of one cannot be asked for.
NEEDS_GPU = {"ray_node_gpus_utilization"}
TINY = [
    "preprocess.ground_size_px=[32, 176]",
    "preprocess.aerial_size_px=[64, 64]",
    "model.backbone.blocks=[1, 1, 1]",
    "model.head.channels=4",
    "train.batch_size=4",
    "train.evaluate_every=4",
    "train.checkpoint_every_steps=20",
    "data.num_threads=1",
]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """When the jobs ran, in Unix time, and what was done to them."""

    begin_s: float
    end_s: float
    num_killed: int


def _start(cluster: Cluster, job: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"jobs.{job}", *arguments]
    return subprocess.Popen(command, env=cluster.environment, cwd=ROOT, stdout=sys.stderr)


def _finish(process: subprocess.Popen[bytes]) -> None:
    assert process.wait(timeout=1500) == 0


def _kill_a_training_worker(cluster: Cluster, prometheus: Prometheus, train: subprocess.Popen[bytes]) -> None:
    """Wait until the training has shown for a while when its workers started, then kill one of them."""
    deadline = time.monotonic() + 900
    shown = "count_over_time(max(ray_cvft_train_start_time_s)[1m:1s]) > 12 and on () max(ray_cvft_train_step) > 30"
    while not prometheus.api("query", query=shown)["result"]:
        assert train.poll() is None, "the training has ended"
        assert time.monotonic() < deadline, "the training shows no steps"
        time.sleep(0.5)
    workers = list_actors(address=cluster.dashboard, filters=[("state", "=", "ALIVE")], timeout=60)
    (victim, *_) = [worker.pid for worker in workers if "TrainWorker" in worker.class_name]
    os.kill(victim, signal.SIGKILL)


@pytest.fixture(scope="module")
def seen(cluster: Cluster, prometheus: Prometheus, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Sharding, and a training of two workers of which one is killed on the way."""
    folder = tmp_path_factory.mktemp("jobs")
    _finish(_start(cluster, "synthesize", "--out", f"{folder}/town", "--pairs", "160"))
    begin_s = time.time()
    shard = ["--root", f"{folder}/town", "--store", "s3://cvft/town", "--pairs-per-shard", "4", "--window", "1"]
    _finish(_start(cluster, "shard", *shard))
    data = ["data.manifest=s3://cvft/town", "train.workers=2", "train.num_epochs=24", f"output={folder}/runs"]
    tracking = [f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    train = _start(cluster, "train", "--config", "town", "name=watched", *data, *tracking, *TINY)
    _kill_a_training_worker(cluster, prometheus, train)
    _finish(train)
    (best, *_) = sorted((folder / "runs/watched/checkpoints").iterdir())
    measured = ["--checkpoint", str(best), "--manifest", "s3://cvft/town", "--batch-size", "4", "--threads", "1"]
    _finish(_start(cluster, "evaluate", *measured))
    time.sleep(3)  # one more scrape
    return Seen(begin_s=begin_s, end_s=time.time(), num_killed=1)


def _values(prometheus: Prometheus, expression: str, seen: Seen) -> list[float]:
    found = prometheus.api("query_range", query=expression, start=seen.begin_s, end=seen.end_s, step=1)["result"]
    return [float(value) for series in found for _, value in series["values"]]


def test_every_panel_has_data(prometheus, seen):
    empty = []
    for title, expression in files.targets():
        if files.names(expression) & NEEDS_GPU:
            continue
        if not _values(prometheus, expression, seen):
            empty.append((title, expression))
    assert empty == []
    with_data = {title for title, expression in files.targets() if not files.names(expression) & NEEDS_GPU}
    assert with_data == {panel["title"] for panel in files.panels()}


def test_the_numbers_are_those_of_the_jobs(prometheus, seen):
    of = dict(reversed(files.targets()))
    assert max(_values(prometheus, "max(ray_cvft_shard_shards_done)", seen)) > 20
    assert max(_values(prometheus, "sum(ray_cvft_evaluate_pairs_total)", seen)) == 40
    assert max(_values(prometheus, of["Restarts"], seen)) == seen.num_killed
    assert max(_values(prometheus, "ray_cvft_train_epoch", seen)) == 24
    assert 0 < max(_values(prometheus, of["Recall by epoch"], seen)) <= 1
    assert 0 <= min(_values(prometheus, of["Waiting for data"], seen)) <= 1
    assert max(_values(prometheus, of["Pairs per second"], seen)) > 0
    fetched = max(_values(prometheus, "sum(ray_cvft_cache_misses_total)", seen))
    shards = max(_values(prometheus, "max(ray_cvft_shard_shards)", seen))
    assert 0 < fetched <= shards  # both ranks share the node's cache, also after the restart
    assert max(_values(prometheus, "sum(ray_cvft_cache_hits_total)", seen)) > 0


def test_every_alert_is_evaluated_and_none_fires_without_a_reason(prometheus, seen):
    groups = prometheus.api("rules")["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert set(rules) == {rule["alert"] for rule in files.alerts()}
    assert {name: rule.get("lastError") for name, rule in rules.items() if rule["health"] != "ok"} == {}
    assert [name for name, rule in rules.items() if rule["state"] == "firing"] == []
