"""Trainings on Ray that lose a worker or a node, held against one that does not.

`tests/bench/chaos_training.py` does so many times, on a cluster of several nodes, and kills drivers too.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.jobs.conftest import NO_PICTURES, TINY

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PREEMPTION = 2  # autoscaler.proto: DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION


@pytest.fixture(scope="module")
def mishaps(ray_cluster):
    from tests import mishaps  # noqa: PLC0415 (imports ray)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mishaps.ray_train, "_run_worker", mishaps.traced_worker)
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
        yield mishaps


@pytest.fixture(scope="module")
def runs(mishaps, manifest_uri, tracking_uri, tmp_path_factory):
    """Where the trainings are; the one named `undisturbed` is there."""
    overrides = [
        f"data.manifest={manifest_uri}",
        f"tracking.uri={tracking_uri}",
        *TINY,
        NO_PICTURES,
        "train.num_epochs=12",
    ]
    often = ["train.checkpoint_every_steps=4", "train.preemption_check_every_steps=1"]
    runs = mishaps.Runs(tmp_path_factory.mktemp("runs"), [*overrides, *often])
    mishaps.Training(runs, "undisturbed", 2).wait()
    return runs


@pytest.fixture
def spot_node(make_node):
    """A second node with one CPU."""
    with make_node() as node:
        yield node


def test_a_killed_worker_and_then_a_node_that_says_it_goes_change_no_bit(mishaps, runs, spot_node):
    import ray  # noqa: PLC0415
    from ray._raylet import GcsClient  # noqa: PLC0415

    class Holder:
        def is_there(self):
            return True

    # One of the head's two CPUs is taken, so that one worker is on each node.
    head = {"ray.io/node-id": f"!{spot_node}"}
    holder = ray.remote(num_cpus=1)(Holder).options(label_selector=head).remote()
    assert ray.get(holder.is_there.remote())
    training = mishaps.Training(runs, "disturbed", 2, further=["train.max_failures=1"])
    os.kill(training.wait_for_step(2)[1]["pid"], signal.SIGKILL)
    assert spot_node in {line["node"] for line in training.wait_for_step(8)}
    wasted_by_the_kill = runs.num_wasted("disturbed")
    ray.kill(holder)
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    assert gcs.drain_node(spot_node, PREEMPTION, "spot", round(1000 * (time.time() + 60)))[0]
    training.wait()
    steps = [line for line in runs.steps("disturbed") if line["rank"] == 0]
    assert len({line["pid"] for line in steps}) == 3
    assert spot_node not in {line["node"] for line in runs.steps("disturbed")[-2:]}
    assert runs.num_wasted("disturbed") == wasted_by_the_kill <= 4
    assert mishaps.Final.of(runs, "disturbed").equals(mishaps.Final.of(runs, "undisturbed"))


@pytest.mark.cluster
def test_a_worker_that_hangs_is_given_up_after_a_while_and_changes_no_bit(mishaps, runs):
    patience = ["train.collective_timeout_s=40", "train.store_patience_s=30", "train.max_failures=1"]
    training = mishaps.Training(runs, "hanging", 2, further=patience)
    hanging = training.wait_for_step(5)[1]["pid"]
    os.kill(hanging, signal.SIGSTOP)
    training.wait()
    steps = [line for line in runs.steps("hanging") if line["rank"] == 1]
    assert len({line["pid"] for line in steps}) == 2
    assert not Path(f"/proc/{hanging}").exists()
    assert mishaps.Final.of(runs, "hanging").equals(mishaps.Final.of(runs, "undisturbed"))
