"""Nodes that come for each stage and go after it: shard, train and evaluate on one machine that behaves as many.

    python tests/bench/autoscaling.py reference --out DIR    # the three stages on this machine alone
    python tests/bench/autoscaling.py cluster --out DIR      # the same by `cvft submit`, a node killed in each

`infra/local/cluster.sh` gives a Ray head with the real autoscaler (nodes are processes), Ceph's S3 gateway and an
MLflow server. The run is right when the manifest has the reference's digest, the weights and recalls are the
reference's to the bit, every stage had nodes of the kind that it asks for, and none are left after it. Writes
DIR/timeline.json and DIR/timeline.png, prints one line of JSON; exits with 1 if anything was not right.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CLUSTER = str(ROOT / "infra" / "local" / "cluster.sh")
PORTS = {"RAY_PORT": "6679", "DASHBOARD_PORT": "8565", "STORE_PORT": "9300", "MLFLOW_PORT": "5300"}
NUM_PAIRS = 240
TRAINING = [
    "name=autoscaled",
    "preprocess.ground_size_px=[32, 176]",
    "preprocess.aerial_size_px=[64, 64]",
    "model.backbone.blocks=[1, 1, 1]",
    "model.backbone.width=0.125",
    "model.backbone.dropout=0.2",
    "model.head.channels=4",
    "train.workers=2",
    "train.num_epochs=8",
    "train.batch_size=16",
    "train.evaluate_every=4",
    "train.checkpoint_every_steps=5",
]
ON = {"shard": "cpu", "train": "train", "evaluate": "train"}


def commands(data: str, runs: str, tracking: str, town: Path) -> dict[str, list[str]]:
    """The three stages; `evaluate` still lacks its checkpoint."""
    places = [f"data.manifest={data}", f"output={runs}", f"tracking.uri={tracking}"]
    return {
        "shard": ["shard", "--root", str(town), "--store", data, "--pairs-per-shard", "5"],
        "train": ["train", "--config", "town", *places, *TRAINING],
        "evaluate": ["evaluate", "--manifest", data],
    }


def run(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a job to its end and return its result."""
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{command[0]}", *command[1:]],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def weights(checkpoint: str) -> str:
    """A digest of a checkpoint's weights."""
    from cvft.checkpoint import MODEL_FILE  # noqa: PLC0415 (reads the environment's store)
    from pipeline.storage import Store  # noqa: PLC0415

    return hashlib.sha256(Store.from_uri(checkpoint).read_bytes(MODEL_FILE)).hexdigest()


def reference(out: Path) -> int:
    """Do the three stages on this machine, in folders."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    town = out / "town"
    run(["synthesize", "--out", str(town), "--pairs", str(NUM_PAIRS), "--workers", "2"], environment)
    stages = commands(str(out / "data"), str(out / "runs"), f"sqlite:///{out}/mlflow.db", town)
    results = {"shard": run(stages["shard"], environment), "train": run(stages["train"], environment)}
    checkpoint = results["train"]["checkpoint"]
    results["evaluate"] = run([*stages["evaluate"], "--checkpoint", checkpoint], environment)
    results["weights"] = weights(checkpoint)
    (out / "reference.json").write_text(json.dumps(results, indent=2))
    print(json.dumps({"digest": results["shard"]["digest"], "weights": results["weights"][:16]}))
    return 0


class Nodes(threading.Thread):
    """Looks at the cluster twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.began = time.monotonic()
        self.samples: list[tuple[float, dict[str, int]]] = []
        self.is_over = threading.Event()

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.began

    def run(self) -> None:
        while not self.is_over.wait(0.5):
            nodes = Counter(group for group, _ in self.look())
            self.samples.append((round(self.now_s, 2), {"cpu": nodes["cpu"], "train": nodes["train"]}))

    def look(self) -> list[tuple[str, str]]:
        """Group and id of each node but the head."""
        from ray.autoscaler.v2.sdk import get_cluster_status  # noqa: PLC0415 (after the token is in the environment)

        status = get_cluster_status(f"127.0.0.1:{PORTS['RAY_PORT']}")
        nodes = [*status.active_nodes, *status.idle_nodes]
        return [(node.ray_node_type_name, node.node_id) for node in nodes if node.ray_node_type_name in ON.values()]

    def are_here_for(self, seconds: float) -> Callable[[], bool]:
        """Return what tells whether there has been a node for so long: its task is at work then."""
        since: list[float] = []

        def is_time() -> bool:
            if self.look():
                since.append(self.now_s)
            return bool(since) and self.now_s - since[0] >= seconds

        return is_time

    def wait_for_none(self, limit_s: float) -> float:
        """Wait until all are gone; return how long it took."""
        began = time.monotonic()
        while self.look():
            assert time.monotonic() - began < limit_s, f"nodes stay: {self.look()}"
            time.sleep(0.5)
        return time.monotonic() - began


def kill_node(node_id: str) -> int:
    """SIGKILL all processes of a node, as a machine that goes without a word; return how many there were."""
    mark, number = f"RAY_CLOUD_INSTANCE_ID={node_id}".encode(), 0
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # a process that has just ended, or is not ours
            if mark in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)
                number += 1
    return number


class Clustered:
    """The three stages by `cvft submit`."""

    def __init__(self, out: Path, environment: dict[str, str], nodes: Nodes) -> None:
        self._out = out
        self._environment = environment
        self.nodes = nodes
        self.stages: list[dict[str, Any]] = []
        self.losses: list[dict[str, Any]] = []

    def stage(self, name: str, command: list[str], is_time_to_kill: Callable[[], bool]) -> dict[str, Any]:
        """Submit a stage, kill one of its nodes when it is time, and wait until nodes are gone."""
        began = self.nodes.now_s
        submit = [sys.executable, "-m", "jobs.submit", "--env", "AWS_*", "--name", name, *command]
        log = (self._out / f"{name}.log").open("w")
        job = subprocess.Popen(submit, cwd=ROOT, env=self._environment, stdout=subprocess.PIPE, stderr=log, text=True)
        while job.poll() is None:
            if is_time_to_kill():
                group, node = next((item for item in self.nodes.look() if item[0] == ON[name]), (None, ""))
                if group is not None:
                    self.losses.append({"at_s": self.nodes.now_s, "group": group, "processes": kill_node(node)})
                    print(f"{name}: {group} node {node[-5:]} killed at {self.losses[-1]['at_s']:.0f} s", flush=True)
                    break
            time.sleep(0.3)
        output, _ = job.communicate()
        ended = self.nodes.now_s
        assert job.returncode == 0, f"{name} ended with {job.returncode}; see {log.name}"
        gone_s = self.nodes.wait_for_none(90)
        time.sleep(2)  # for a look at the cluster without nodes
        held = self._what_is_held()
        self.stages.append({"name": name, "began_s": began, "ended_s": ended, "gone_after_s": gone_s, "held": held})
        print(f"{name}: {ended - began:.0f} s, its nodes gone {gone_s:.0f} s later; held after it: {held}", flush=True)
        return json.loads(output.splitlines()[-1])

    def _what_is_held(self) -> dict[str, int]:
        """Actors and placement groups that outlive the stage, but for Ray Train's record of trainings on the head."""
        from ray.util import state  # noqa: PLC0415

        address = self._environment["RAY_API_SERVER_ADDRESS"]
        actors = state.list_actors(address=address, filters=[("state", "=", "ALIVE")])
        groups = state.list_placement_groups(address=address, filters=[("state", "!=", "REMOVED")])
        ours = [actor for actor in actors if actor.class_name != "TrainStateActor"]  # detached, without a CPU
        return {"actors": len(ours), "placement_groups": len(groups)}


def cluster(out: Path, folder: Path) -> int:
    """Start everything, run the stages, compare with the reference."""
    expected = json.loads((out / "reference.json").read_text())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    environment |= {**PORTS, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    try:
        started = subprocess.run(
            [CLUSTER, "start", str(folder)], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        exports = (line.removeprefix("export ").partition("=") for line in started.stdout.splitlines())
        environment |= {name: value for name, _, value in exports} | {"PYTHONPATH": str(ROOT)}
        os.environ.update(environment)  # for what this process asks of the store and of Ray
        results, clustered = stages_on(out, environment)
    finally:
        subprocess.run([CLUSTER, "stop", str(folder)], check=True)
    return judge(out, expected, results, clustered)


def stages_on(out: Path, environment: dict[str, str]) -> tuple[dict[str, Any], Clustered]:
    import boto3  # noqa: PLC0415 (reads the environment)

    from pipeline.storage import Store  # noqa: PLC0415

    boto3.client("s3").create_bucket(Bucket="cvft")
    data, runs = "s3://cvft/data", "s3://cvft/runs"
    stages = commands(data, runs, environment["MLFLOW_TRACKING_URI"], out / "town")
    nodes = Nodes()
    nodes.start()
    clustered = Clustered(out, environment, nodes)

    def is_written(store: str, suffix: str, least: int) -> Callable[[], bool]:
        return lambda: sum(name.endswith(suffix) for name in Store.from_uri(store).list()) >= least

    label = {name: f"ray.io/node-group={group}" for name, group in ON.items()}
    results = {}
    try:
        shard = [*stages["shard"], "--node-label", label["shard"]]
        results["shard"] = clustered.stage("shard", shard, is_written(data, ".tar", 4))
        train = [*stages["train"], "train.node_labels={ray.io/node-group: train}"]
        results["train"] = clustered.stage("train", train, is_written(f"{runs}/autoscaled", "checkpoint.json", 1))
        checkpoint = results["train"]["checkpoint"]
        evaluate = [*stages["evaluate"], "--checkpoint", checkpoint, "--node-label", label["evaluate"]]
        results["evaluate"] = clustered.stage("evaluate", evaluate, nodes.are_here_for(6.0))
        results["weights"] = weights(checkpoint)
        results["mlflow"] = mlflow_run(environment["MLFLOW_TRACKING_URI"], results["train"]["run_id"])
    finally:
        nodes.is_over.set()
        nodes.join()
    return results, clustered


def mlflow_run(uri: str, run_id: str) -> dict[str, Any]:
    from mlflow import MlflowClient  # noqa: PLC0415

    found = MlflowClient(uri).get_run(run_id)
    return {"status": found.info.status, "recall_at_1": found.data.metrics.get("recall_at_1")}


def judge(out: Path, expected: dict[str, Any], results: dict[str, Any], clustered: Clustered) -> int:
    from pipeline.report.timeline import Loss, Stage, timeline_figure  # noqa: PLC0415

    recalls = ("recall_at_1", "recall_at_5", "recall_at_10", "num_queries")
    samples = clustered.nodes.samples
    following = [*(stage["began_s"] for stage in clustered.stages[1:]), samples[-1][0]]
    checks = {
        "digest": results["shard"]["digest"] == expected["shard"]["digest"],
        "weights": results["weights"] == expected["weights"],
        "recall": all(results["evaluate"][key] == expected["evaluate"][key] for key in recalls),
        "mlflow_finished": results["mlflow"]["status"] == "FINISHED",
        "a_node_killed_in_each": len(clustered.losses) == len(ON),
        "nothing_held": not any(count for stage in clustered.stages for count in stage["held"].values()),
        "nodes_in_each": all(
            any(nodes[ON[stage["name"]]] > 0 for at, nodes in samples if stage["began_s"] <= at <= stage["ended_s"])
            for stage in clustered.stages
        ),
        "none_after_each": all(
            any(sum(nodes.values()) == 0 for at, nodes in samples if stage["ended_s"] <= at <= ended_s)
            for stage, ended_s in zip(clustered.stages, following, strict=True)
        ),
        "none_at_the_end": sum(samples[-1][1].values()) == 0,
    }
    stages = [Stage(stage["name"], stage["began_s"], stage["ended_s"]) for stage in clustered.stages]
    losses = [Loss(loss["at_s"], loss["group"]) for loss in clustered.losses]
    timeline_figure(samples, stages=stages, losses=losses).savefig(out / "timeline.png")
    content = {"checks": checks, "stages": clustered.stages, "losses": clustered.losses, "results": results}
    (out / "timeline.json").write_text(json.dumps({**content, "samples": samples}, indent=1))
    shown = {"stages": [asdict(stage) for stage in stages], "recall_at_1": results["evaluate"]["recall_at_1"]}
    print(json.dumps({"checks": checks, **shown, "retries": results["shard"]["retries"]}))
    return 0 if all(checks.values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("reference", "cluster"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the town, the reference and the timeline")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/cvft-auto"), help="of the cluster; its path must be short"
    )
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    return reference(out) if options.what == "reference" else cluster(out, options.folder)


if __name__ == "__main__":
    sys.exit(main())
