"""Nodes that come for each stage and go after it: shard, train and evaluate on one machine that behaves as many.

    python tests/bench/autoscaling.py reference --out DIR    # the three stages on this machine alone
    python tests/bench/autoscaling.py cluster --out DIR      # the same as jobs of a cluster, a node killed in each

`infra/local/cluster.sh` gives a Ray head with the real autoscaler (nodes are processes), Ceph's S3 gateway and an
MLflow server. In each stage a node is killed while the stage's own work runs on it. The run is right when the manifest
has the reference's digest, the weights, the curve and the recalls are the reference's to the bit, every stage had nodes
of the kind that it asks for and lost work with one of them, nothing is held after it and no node is left, and the
server of MLflow holds what is held of the reference. Writes DIR/timeline.json and DIR/timeline.png, prints a line of
JSON; exits with 1 if anything was not right.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvft.checkpoint import INFO_FILE, MODEL_FILE
from pipeline.report.timeline import Mishap, Stage, timeline_figure
from pipeline.storage import Store
from tests.job_process import ROOT, run_job

if TYPE_CHECKING:  # Ray reads how to authenticate when it is imported
    from tests.bench.cluster_watch import Node, Watch

CLUSTER = str(ROOT / "infra" / "local" / "cluster.sh")
PORTS = {"RAY_PORT": "6679", "DASHBOARD_PORT": "8565", "STORE_PORT": "9300", "MLFLOW_PORT": "5300"}
NUM_PAIRS = 600
TRAINING = [
    "name=autoscaled",
    "preprocess.ground_size_px=[32, 176]",
    "preprocess.aerial_size_px=[64, 64]",
    "model.backbone.blocks=[1, 1, 1]",
    "model.backbone.dropout=0.1",
    "model.head.channels=16",
    "data.keep_pixels=host",
    "train.workers=2",
    "train.num_epochs=12",
    "train.evaluate_every=3",
    "train.checkpoint_every_steps=10",
    "train.optimizer.learning_rate=2e-3",
]
ON = {"shard": "cpu", "train": "train", "evaluate": "train"}
BY = {"shard": "ray job submit", "train": "cvft submit", "evaluate": "ray job submit"}
WORK = {"shard": "_run_later", "train": "RayTrainWorker", "evaluate": "_measure"}
"""What of each stage runs on nodes, as Ray calls it."""
LIMIT_S = 60.0


def commands(data: str, runs: str, tracking: str, town: Path) -> dict[str, list[str]]:
    """The three stages; `evaluate` still lacks its checkpoint."""
    places = [f"data.manifest={data}", f"output={runs}", f"tracking.uri={tracking}"]
    return {
        "shard": ["shard", "--root", str(town), "--store", data, "--pairs-per-shard", "10"],
        "train": ["train", "--config", "town", *places, *TRAINING],
        "evaluate": ["evaluate", "--manifest", data],
    }


def trained(checkpoint: str) -> dict[str, Any]:
    """What a training has made, without times: the digest of its weights, and loss and recall of each evaluation."""
    store = Store.from_uri(checkpoint)
    epochs = json.loads(store.read_bytes(INFO_FILE))["training"]["epochs"]
    return {
        "weights": hashlib.sha256(store.read_bytes(MODEL_FILE)).hexdigest(),
        "curve": [[epoch[name] for name in ("step", "loss", "recall_at_1")] for epoch in epochs],
    }


def in_mlflow(uri: str, run_id: str) -> dict[str, Any]:
    """What MLflow holds of a training."""
    from mlflow import MlflowClient  # noqa: PLC0415 (takes seconds)

    client = MlflowClient(uri)
    found = client.get_run(run_id)
    history = client.get_metric_history(run_id, "recall_at_1")
    artifacts, folders = [], [""]
    while folders:
        for item in client.list_artifacts(run_id, folders.pop()):
            (folders if item.is_dir else artifacts).append(item.path)
    models = client.search_logged_models([found.info.experiment_id], filter_string=f"source_run_id = '{run_id}'")
    return {
        "status": found.info.status,
        "runs": len(client.search_runs([found.info.experiment_id])),
        "metrics": len(found.data.metrics),
        "recall_at_1": [[point.step, point.value] for point in sorted(history, key=lambda point: point.step)],
        "artifacts": len(artifacts),
        "models": len(models),
    }


def reference(out: Path) -> int:
    """Do the three stages on this machine, in folders."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    town, tracking = out / "town", f"sqlite:///{out}/mlflow.db"
    run_job(["synthesize", "--out", str(town), "--pairs", str(NUM_PAIRS), "--workers", "2"], environment)
    stages = commands(str(out / "data"), str(out / "runs"), tracking, town)
    results = {"shard": run_job(stages["shard"], environment), "train": run_job(stages["train"], environment)}
    checkpoint = results["train"]["checkpoint"]
    results["evaluate"] = run_job([*stages["evaluate"], "--checkpoint", checkpoint], environment)
    results |= {"trained": trained(checkpoint), "mlflow": in_mlflow(tracking, results["train"]["run_id"])}
    (out / "reference.json").write_text(json.dumps(results, indent=2))
    shown = {"digest": results["shard"]["digest"], "weights": results["trained"]["weights"][:16]}
    print(json.dumps({**shown, "recall_at_1": results["evaluate"]["recall_at_1"]}))
    return 0


class Clustered:
    """The three stages as jobs of the cluster."""

    def __init__(self, out: Path, environment: dict[str, str], watch: Watch) -> None:
        self._out = out
        self._environment = environment
        self._api = environment["RAY_API_SERVER_ADDRESS"]
        self._watch = watch
        self.stages: list[dict[str, Any]] = []

    def stage(self, name: str, command: list[str], is_time_to_kill: Callable[[], bool]) -> dict[str, Any]:
        """Submit a stage, kill a node that its work runs on when it is time, and wait until all nodes are gone.

        Code is taken from where the nodes have it: the nodes of one machine cannot each unpack what is sent.
        """
        began = self._watch.now_s
        with (self._out / f"{name}.log").open("w+") as log:
            job = subprocess.Popen(
                self._submit(name, command), cwd=ROOT, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
            loss, lost = self._kill(name, job, is_time_to_kill)
            job.wait()
            log.seek(0)
            output = log.read()
        assert job.returncode == 0, f"{name} ended with {job.returncode}; see {log.name}"
        ended = self._watch.now_s
        gone_s = self._watch.wait_for_none(LIMIT_S)
        time.sleep(2)  # for a look at the cluster without nodes
        held = self._watch.held(self._api)
        if loss is not None and lost is not None:
            loss |= {
                "lost": self._watch.lost_on(lost, self._api),
                "finished_on": len(set(self._watch.finished_on(WORK[name], self._api))),
            }
            loss |= {"went_on_from": sorted(set(re.findall(r"going on from (\S+)", output)))}
        stage = {"name": name, "by": BY[name], "began_s": began, "ended_s": ended, "gone_after_s": gone_s}
        self.stages.append({**stage, "loss": loss, "held": held})
        print(f"{name}: {ended - began:.0f} s, its nodes gone {gone_s:.0f} s later; left: {held}; {loss}", flush=True)
        return json.loads([line for line in output.splitlines() if line.startswith('{"')][-1])

    def _submit(self, name: str, command: list[str]) -> list[str]:
        if BY[name] == "cvft submit":
            return [sys.executable, "-m", "jobs.submit", "--env", "AWS_*", "--name", name, *command]
        variables = {key: value for key, value in self._environment.items() if key.startswith("AWS_")}
        ray = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--submission-id", name]
        entrypoint = ["python", "-m", f"jobs.{command[0]}", *command[1:]]
        return [*ray, "--runtime-env-json", json.dumps({"env_vars": variables}), "--", *entrypoint]

    def _kill(
        self, name: str, job: subprocess.Popen[bytes], is_time: Callable[[], bool]
    ) -> tuple[dict[str, Any] | None, Node | None]:
        while job.poll() is None:
            if is_time():
                at_work = {node: node.work() for node in self._watch.nodes() if node.group == ON[name]}
                at_work = {node: work for node, work in at_work.items() if any(WORK[name] in title for title in work)}
                for node, work in at_work.items():
                    loss = {"at_s": self._watch.now_s, "group": node.group, "node": node.identity[-5:], "work": work}
                    loss |= {"nodes_at_work": len(at_work), "processes": node.kill()}
                    print(f"{name}: {loss}", flush=True)
                    return loss, node
            time.sleep(0.1)
        return None, None


def cluster(out: Path, folder: Path) -> int:
    """Start everything, run the stages, compare with the reference."""
    expected = json.loads((out / "reference.json").read_text())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    # A cache of its own: what this run reads, it reads from its own store.
    environment |= {**PORTS, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": f"{folder}/cache"}
    try:
        started = subprocess.run(
            [CLUSTER, "start", str(folder)], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        exports = (line.removeprefix("export ").partition("=") for line in started.stdout.splitlines())
        environment |= {name: value for name, _, value in exports} | {"PYTHONPATH": str(ROOT)}
        os.environ.update(environment)  # for what this process asks of the store and of Ray
        content = stages_on(out, folder, environment)
        (out / "timeline.json").write_text(json.dumps(content))  # whatever comes after it
    finally:
        subprocess.run([CLUSTER, "stop", str(folder)], check=True)
    return judge(out, expected, content)


def stages_on(out: Path, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run the stages on a cluster that has started."""
    import boto3  # noqa: PLC0415 (reads the environment)

    from tests.bench.cluster_watch import Watch  # noqa: PLC0415 (reads it too)

    buckets = boto3.client("s3")
    buckets.create_bucket(Bucket="cvft")
    data, runs, tracking = "s3://cvft/data", "s3://cvft/runs", environment["MLFLOW_TRACKING_URI"]
    stages = commands(data, runs, tracking, out / "town")
    watch = Watch(PORTS["RAY_PORT"], set(ON.values()))
    watch.start()
    clustered = Clustered(out, environment, watch)

    def are_written(store: str, suffix: str, least: int) -> bool:
        return sum(name.endswith(suffix) for name in Store.from_uri(store).list()) >= least

    def num_shards_read() -> int:
        log = (folder / "store" / "client.rgw.log").read_text(errors="replace")
        return len(re.findall(r'"GET /cvft/data/\S+\.tar', log))

    results: dict[str, Any] = {}
    label = {name: f"ray.io/node-group={group}" for name, group in ON.items()}
    try:
        shard = [*stages["shard"], "--node-label", label["shard"]]
        results["shard"] = clustered.stage("shard", shard, lambda: are_written(data, ".tar", 6))
        train = [*stages["train"], "train.node_labels={ray.io/node-group: train}"]
        is_saved = lambda: are_written(f"{runs}/autoscaled", INFO_FILE, 1)  # noqa: E731
        results["train"] = clustered.stage("train", train, is_saved)
        checkpoint, before = results["train"]["checkpoint"], num_shards_read()
        evaluate = [*stages["evaluate"], "--checkpoint", checkpoint, "--node-label", label["evaluate"]]
        results["evaluate"] = clustered.stage("evaluate", evaluate, lambda: num_shards_read() >= before + 2)
        results["trained"] = trained(checkpoint)
        results["mlflow"] = in_mlflow(tracking, results["train"]["run_id"])
        objects = buckets.list_objects_v2(Bucket="mlflow").get("Contents", [])
        results["objects_of_mlflow"] = len(objects)
        results["shards_read_by_evaluate"] = num_shards_read() - before
    finally:
        watch.end()
    return {"results": results, "stages": clustered.stages, "requests": watch.requests, "samples": watch.samples}


def judge(out: Path, expected: dict[str, Any], content: dict[str, Any]) -> int:
    """Compare with the reference, draw and write the timeline."""
    results, samples, stages = content["results"], content["samples"], content["stages"]
    recalls = ("recall_at_1", "recall_at_5", "recall_at_10", "num_queries")
    losses = {stage["name"]: stage["loss"] for stage in stages if stage["loss"] is not None}
    ends = [*(stage["began_s"] for stage in stages[1:]), samples[-1][0]]

    def during(began_s: float, ended_s: float) -> list[dict[str, int]]:
        return [nodes for at, nodes in samples if began_s <= at <= ended_s]

    def is_lost(name: str) -> bool:
        return any(WORK[name] in lost for lost in losses.get(name, {}).get("lost", {}))

    checks = {
        "digest": results["shard"]["digest"] == expected["shard"]["digest"],
        "weights": results["trained"] == expected["trained"],
        "recall": all(results["evaluate"][key] == expected["evaluate"][key] for key in recalls),
        "above_chance": results["evaluate"]["recall_at_1"] > 10 * results["evaluate"]["chance"],
        "in_mlflow": all(value == expected["mlflow"][key] for key, value in results["mlflow"].items()),
        "mlflow_finished": results["mlflow"]["status"] == "FINISHED",
        "artifacts_in_the_store": results["objects_of_mlflow"] >= results["mlflow"]["artifacts"] > 0,
        "work_lost_in_each": all(is_lost(stage["name"]) for stage in stages),
        "two_workers_on_two_nodes": losses["train"]["nodes_at_work"] == 2,
        "repeated": results["shard"]["retries"] > 0
        and len(losses["train"]["went_on_from"]) > 0
        and losses["evaluate"]["finished_on"] == 1,
        "nodes_in_each": all(
            any(nodes[ON[stage["name"]]] > 0 for nodes in during(stage["began_s"], stage["ended_s"]))
            for stage in stages
        ),
        "none_after_each": all(
            any(sum(nodes.values()) == 0 for nodes in during(stage["ended_s"], end))
            for stage, end in zip(stages, ends, strict=True)
        ),
        "nothing_held": not any(held for stage in stages for name, held in stage["held"].items() if "Ray" not in name),
        "none_at_the_end": sum(samples[-1][1].values()) == 0,
    }
    drawn = [Stage(stage["name"], stage["began_s"], stage["ended_s"]) for stage in stages]
    marks = [Mishap(loss["at_s"], loss["group"]) for loss in losses.values()]
    timeline_figure(samples, stages=drawn, mishaps=marks).savefig(out / "timeline.png")
    (out / "timeline.json").write_text(json.dumps({"checks": checks, **content}, indent=1))
    shown = {"stages": [asdict(stage) for stage in drawn], "recall_at_1": results["evaluate"]["recall_at_1"]}
    print(json.dumps({"checks": checks, **shown, "mlflow": results["mlflow"]}))
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
