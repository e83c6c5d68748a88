"""Training under fire: a rank, a node or the driver is killed (SIGKILL), or a node says that it goes, at seeded steps.

    python tests/bench/chaos_training.py --rank 5 --node 5 --driver 5 --preemption 5

A local Ray cluster of several nodes trains a tiny network on a tiny town: first undisturbed, then once per run with one
mishap. In the last two runs of node, driver and preemption (`--elastic`) the number of workers changes on the way: down
with the node, up again when it is replaced, or as the second command says. A run is right
when the loss of each step, the recalls, the weights and the optimizer's state at the end are those of the undisturbed
training: to the bit where the number of workers stayed the same, to 1e-5 where it changed. A step that was done more
than once is wasted; with notice there must be none. Prints a table and one line of JSON; exits with 1 if a run was not
right.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

from jobs.training import ray_train
from pipeline.build import BuildOptions, build_shards
from pipeline.plan import Cut
from pipeline.runner import Here
from pipeline.synthetic.write import TownConfig, write_town
from tests.mishaps import ROOT, Final, Runs, Training, traced_worker
from tests.ports import free_ports

TINY = [
    "preprocess.ground_size_px=[32, 176]",
    "preprocess.aerial_size_px=[64, 64]",
    "model.backbone.blocks=[1, 1, 1]",
    "model.backbone.width=0.125",
    "model.backbone.dropout=0.2",
    "model.head.channels=4",
    "data.num_threads=1",
    "train.batch_size=4",
    "train.num_epochs=5",
    "train.evaluate_every=2",
    "train.checkpoint_every_steps=4",
    "train.preemption_check_every_steps=1",
    "train.resize_after_s=2",
]
NUM_NODES = 3
NOTICE_S = 20.0
TOLERANCE = 1e-5
PREEMPTION = 2  # autoscaler.proto: DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION


@dataclass(frozen=True)
class Outcome:
    """One run: what went wrong when, what came of it, and what it cost."""

    mishap: str
    at_step: int
    num_workers: list[int]
    wasted_steps: int
    loss_difference: float
    weight_difference: float
    is_right: bool
    total_s: float
    lost_s: float


def make_town(folder: Path) -> Runs:
    """Make a tiny town and its shards in `folder`."""
    write_town(folder / "town", config=TownConfig(num_pairs=32, seed=3), workers=1)
    options = BuildOptions(cut=Cut(pairs_per_shard=8))
    manifest = build_shards(folder / "town", str(folder / "store"), options, runner=Here()).manifest
    (folder / "runs").mkdir()
    return Runs(folder / "runs", [f"data.manifest={manifest}", f"tracking.uri=sqlite:///{folder}/mlflow.db", *TINY])


class Nodes:
    """The cluster: a head without CPUs, and nodes with one each."""

    def __init__(self, folder: Path) -> None:
        port, dashboard_port = free_ports(2)
        # Known before any process starts: Ray's helpers would else look for a cluster among all of this machine.
        os.environ["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"
        head = {"num_cpus": 0, "gcs_server_port": port, "temp_dir": str(folder)}
        head |= {"include_dashboard": True, "dashboard_port": dashboard_port}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.restore()
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, configure_logging=False)

    def restore(self) -> None:
        """Have the usual number of nodes again."""
        while len(self._cluster.worker_nodes) < NUM_NODES:
            self._cluster.add_node(num_cpus=1)

    def lose(self, node_id: str) -> None:
        node = next(node for node in self._cluster.worker_nodes if node.node_id == node_id)
        self._cluster.remove_node(node, allow_graceful=False)

    def preempt(self, node_id: str) -> None:
        """Give notice, and take the node away at the end of it, or as soon as it has stopped by itself."""
        node = next(node for node in self._cluster.worker_nodes if node.node_id == node_id)
        deadline = time.time() + NOTICE_S
        gcs = GcsClient(address=self._cluster.gcs_address)
        is_accepted, reason = gcs.drain_node(node_id, PREEMPTION, "spot", round(deadline * 1000))
        assert is_accepted, reason
        while time.time() < deadline and node.remaining_processes_alive():
            time.sleep(0.1)
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


class Chaos:
    """Undisturbed trainings, and those to be held against them."""

    def __init__(self, runs: Runs, nodes: Nodes) -> None:
        self._runs = runs
        self._nodes = nodes
        self.undisturbed_s = {}
        for has_process in (False, True):
            name = f"undisturbed-{has_process}"
            self.undisturbed_s[has_process] = Training(runs, name, 2, has_process=has_process).wait()
        self._undisturbed = Final.of(runs, "undisturbed-False")
        self.is_deterministic = self._undisturbed.equals(Final.of(runs, "undisturbed-True"))
        self.num_steps = len(self._undisturbed.losses)

    def run(self, name: str, mishap: str, rng: random.Random, *, is_elastic: bool) -> Outcome:
        step = rng.randrange(2, self.num_steps // 2 if is_elastic else self.num_steps - 2)
        before, after = (2, 2) if not is_elastic else (2, rng.choice([1, 3])) if mishap == "driver" else ([1, 3],) * 2
        training = Training(self._runs, name, before, has_process=mishap == "driver")
        victim = rng.choice(sorted(training.wait_for_step(step), key=lambda line: line["rank"]))
        if mishap == "rank":
            os.kill(victim["pid"], signal.SIGKILL)
        elif mishap == "node":
            self._nodes.lose(victim["node"])
        elif mishap == "preemption":
            self._nodes.preempt(victim["node"])
        else:
            training.kill_driver()
            began = training.began
            training = Training(self._runs, name, after, has_process=True)
            training.began = began
        if mishap == "node" and is_elastic:
            training.wait_for_size(NUM_NODES - 1)
        self._nodes.restore()
        total_s = training.wait()
        return self._judge(name, mishap, step, total_s)

    def _judge(self, name: str, mishap: str, step: int, total_s: float) -> Outcome:
        steps = [line for line in self._runs.steps(name) if line["rank"] == 0]
        wasted = self._runs.num_wasted(name)
        sizes = [size for size, _ in itertools.groupby(line["size"] for line in steps)]
        final = Final.of(self._runs, name)
        loss, weight = final.differences(self._undisturbed)
        is_right = final.equals(self._undisturbed) if sizes == [2] else max(loss, weight) <= TOLERANCE
        return Outcome(
            mishap=mishap,
            at_step=step,
            num_workers=sizes,
            wasted_steps=wasted,
            loss_difference=loss,
            weight_difference=weight,
            is_right=is_right and (wasted == 0 or mishap != "preemption"),
            total_s=total_s,
            lost_s=total_s - self.undisturbed_s[mishap == "driver"],
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for mishap in ("rank", "node", "driver", "preemption"):
        parser.add_argument(f"--{mishap}", type=int, default=5, help=f"number of runs with a {mishap}")
    parser.add_argument("--elastic", type=int, default=2, help="runs of each kind but rank that change their size")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    os.environ |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    os.environ |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}
    ray_train._run_worker, rng, outcomes = traced_worker, random.Random(options.seed), []
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        nodes = Nodes(Path(folder) / "ray")
        try:
            chaos = Chaos(make_town(Path(folder)), nodes)
            print(f"undisturbed: {chaos.num_steps} steps, seconds {chaos.undisturbed_s}", flush=True)
            for mishap in ("rank", "node", "driver", "preemption"):
                for number in range(num_runs := getattr(options, mishap)):
                    is_elastic = mishap != "rank" and number >= num_runs - options.elastic
                    outcomes.append(chaos.run(f"{mishap}-{number}", mishap, rng, is_elastic=is_elastic))
                    print_row(outcomes[-1])
        finally:
            nodes.shutdown()
    print(json.dumps(summary(chaos, outcomes)))
    return 0 if chaos.is_deterministic and all(outcome.is_right for outcome in outcomes) else 1


def print_row(outcome: Outcome) -> None:
    is_same = outcome.loss_difference == outcome.weight_difference == 0
    verdict = "right" if outcome.is_right else "WRONG"
    print(
        f"{outcome.mishap:10} at step {outcome.at_step:2d}, workers {'->'.join(map(str, outcome.num_workers)):7}"
        f" wasted steps {outcome.wasted_steps:2d}, lost {outcome.lost_s:+6.1f} s of {outcome.total_s:5.1f}: {verdict}, "
        + (
            "the same bits"
            if is_same
            else f"loss {outcome.loss_difference:.1e}, weights {outcome.weight_difference:.1e}"
        ),
        flush=True,
    )


def summary(chaos: Chaos, outcomes: list[Outcome]) -> dict[str, Any]:
    kinds = sorted({outcome.mishap for outcome in outcomes})
    return {
        "undisturbed_s": round(chaos.undisturbed_s[False], 1),
        "undisturbed_process_s": round(chaos.undisturbed_s[True], 1),
        "steps": chaos.num_steps,
        "is_deterministic": chaos.is_deterministic,
        "right": sum(outcome.is_right for outcome in outcomes),
        "runs": len(outcomes),
        "wasted_steps": {kind: [o.wasted_steps for o in outcomes if o.mishap == kind] for kind in kinds},
        "median_lost_s": {
            kind: round(statistics.median(o.lost_s for o in outcomes if o.mishap == kind), 1) for kind in kinds
        },
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }


if __name__ == "__main__":
    sys.exit(main())
