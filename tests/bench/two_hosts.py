"""Two hosts that train together, one of which is cut off: its link, or that between the two, goes and comes back.

    python tests/bench/two_hosts.py reference --out DIR    # a town, and the trainings undisturbed on this machine
    python tests/bench/two_hosts.py cut --out DIR          # the same by `cvft submit` from a third host

`infra/local/hosts.sh` makes the hosts, so `cut` needs root and iproute2; this machine is the object store (Ceph's S3
gateway) and the MLflow server that the hosts reach. `fixed` trains with two workers, one on each host, and meets four
mishaps: the link of a host is away for five seconds (`short`), until Ray has given the host up (`away`), the same for
the host of rank 0, which writes the checkpoints (`writer`), and the two hosts do not reach each other, but all others
do (`apart`). `elastic` goes on with one worker where a host is cut off, and with two when it is back.

It is right when losses, recalls, weights and optimizer are the undisturbed training's, to the bit with two workers and
to rounding where their number changed; when every step is in MLflow once; when every checkpoint was published once; and
when nothing but `short` left the workers where they were. Writes DIR/hosts.json, DIR/hosts.png and logs, prints one
line of JSON; exits with 1 if anything was not right. Of the environment, RAY_health_check_* decide how soon Ray gives a
host up; here it is about ten seconds, by default a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.hosts import ADDRESSES, HOSTS, Bucket, Job, Nodes, hosts, traffic
from tests.job_process import ROOT, run_job
from tests.mishaps import Final, Runs

# The elastic one must last until the other host is back: a minute on the rest. A checkpoint at each step sees to that;
# with one each five steps it was over before, on a machine with nothing else to do.
TRAININGS = {
    "fixed": ["train.workers=2", "train.num_epochs=20"],
    "elastic": ["train.workers=[1, 2]", "train.num_epochs=40", "train.checkpoint_every_steps=1"],
}
NUM_PAIRS = 96
CONFIGURATION = [
    "preprocess.ground_size_px=[32, 176]",
    "preprocess.aerial_size_px=[64, 64]",
    "model.backbone.blocks=[1, 1, 1]",
    "model.backbone.width=0.125",
    "model.backbone.dropout=0.2",
    "model.head.channels=4",
    "train.batch_size=8",
    "train.evaluate_every=5",
    "train.checkpoint_every_steps=5",
    "train.keep_last=1000",
    "train.store_patience_s=15",
    "train.collective_timeout_s=60",
    "train.preemption_check_every_steps=5",
    "train.resize_after_s=3",
    "tracking.pictures=false",
    "tracking.log_every_steps=1",
]
# After which step a link is cut.
PLANS = {"fixed": {"short": 20, "away": 50, "writer": 90, "apart": 130}, "elastic": {"rest": 30}}
# Of a step's loss where the number of workers changed: none before that, and rounding alone for so many steps after it.
# Then rounding grows, as it does between two undisturbed trainings with one worker and with two: not beyond twice that.
ROUNDING, NUM_STEPS_OF_ROUNDING, MOST_GROWN = 1e-5, 20, 2.0
ALONE = "elastic-alone"
GROUPS = {"short": 0, "away": 1, "writer": 1, "apart": 1, "rest": 2}  # of workers that start anew
TITLE = "Hosts that Ray takes for alive"


def reference(out: Path) -> int:
    """Make the town, and train on this machine alone."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    town = ["synthesize", "--out", str(out / "town"), "--pairs", str(NUM_PAIRS), "--workers", "2"]
    shards = ["shard", "--root", str(out / "town"), "--store", str(out / "data"), "--pairs-per-shard", "12"]
    places = [f"data.manifest={out}/data", f"output={out}/runs", f"tracking.uri=sqlite:///{out}/mlflow.db"]
    command = ["train", "--config", "town", *places, *CONFIGURATION]
    trainings = [
        [*command, *settings, "train.workers=2", f"name={undisturbed(name)}"] for name, settings in TRAININGS.items()
    ]
    alone = [*command, *TRAININGS["elastic"], "train.workers=1", f"name={ALONE}"]
    for each in (town, shards, *trainings, alone):
        print(json.dumps(run_job(each, environment)))
    return 0


def undisturbed(name: str) -> str:
    """Name the training that another is held against."""
    return f"{name}-undisturbed"


class Cuts:
    """Takes links away from a training and gives them back; the seconds of each from the cut on."""

    def __init__(self, folder: Path, job: Job, bucket: Bucket, nodes: Nodes) -> None:
        self._folder, self._job, self._bucket, self._nodes = folder, job, bucket, nodes
        self.done: list[dict[str, Any]] = []

    def cut(self, kind: str, *, after_step: int) -> None:
        """Do one, and wait until the training goes on."""
        job = self._job
        job.wait_for(lambda: len(job.ranks()) == 2 and self._step() >= after_step)
        ranks = job.ranks()
        host = ranks[0 if kind == "writer" else 1]
        began = time.time()
        self.done.append({"kind": kind, "training": job.name, "host": host, "at_step": self._step(), "at": began})
        self._hosts("cut", *(sorted(ADDRESSES.values()) if kind == "apart" else [host]))
        if kind == "short":
            time.sleep(5.0)
        else:
            self._note("told_s", job.wait_for(lambda: job.found(r"failure \d+ of", after_s=began))[0])
        if kind in ("away", "writer", "rest"):
            self._note("lost_s", job.wait_for(lambda: self._nodes.lost_s(host, began)))
        if kind == "rest":
            told = began + self.done[-1]["told_s"]
            self._note("on_the_rest_s", job.wait_for(lambda: self._going_on(told)))
            step = self._step() + 5  # a host that is back needs half a minute to join, and the rest goes on meanwhile
            job.wait_for(lambda: self._step() >= step)
        mended = time.time()
        self._hosts("mend")
        self._note("mended_s", mended)
        if kind in ("away", "writer", "rest"):
            self._note("node_back_s", job.wait_for(lambda: self._nodes.back_s(host, began)))
        if kind != "short":
            since = mended if kind == "rest" else began
            started = "Started training worker group of size 2"
            self._note("started_s", job.wait_for(lambda: job.found(started, after_s=since))[0])
            since = began + self.done[-1]["started_s"]
        else:
            since = mended
        self._note("going_on_s", job.wait_for(lambda: self._going_on(since)))
        print(f"{job.name}, {kind}: {self.done[-1]}", flush=True)

    def _note(self, name: str, at: float) -> None:
        self.done[-1][name] = round(at - self.done[-1]["at"], 1)

    def _step(self) -> int:
        published = self._bucket.published(self._job.name)
        return published[-1][1] if published else 0

    def _going_on(self, since: float) -> float | None:
        """When the first checkpoint after it became whole."""
        return next((at for at, _ in self._bucket.published(self._job.name) if at > since), None)

    def _hosts(self, what: str, *names: str) -> None:
        subprocess.run([HOSTS, what, str(self._folder), *names], check=True)


def cut(out: Path, folder: Path, wanted: list[str]) -> int:
    """Train on the hosts with the mishaps that are wanted, and compare."""
    chosen = {name: {kind: step for kind, step in plan.items() if kind in wanted} for name, plan in PLANS.items()}
    plans = {name: plan for name, plan in chosen.items() if plan}
    with hosts(out, folder) as environment, Nodes() as nodes:
        bucket = Bucket()
        bucket.put(out / "data")
        results = {}
        for name, plan in plans.items():
            before = traffic()
            job = Job(name, training(name, environment), out=out, folder=folder, environment=environment)
            cuts = Cuts(folder, job, bucket, nodes)
            for kind, step in plan.items():
                cuts.cut(kind, after_step=step)
            job.join()
            ended = job.process.wait()
            sent = {host: (traffic()[host] - before[host]) for host in before}
            results[name] = {"exit_code": ended, "cuts": cuts.done, "sent_bytes": sent}
            results[name] |= {"began": job.began_s, "ended": time.time(), "log": job.lines}
            results[name]["published"] = bucket.published(name)
            results[name]["mlflow"] = history(environment["MLFLOW_TRACKING_URI"], name)
            bucket.fetch(name, out / "runs")
    return judge(out, results, nodes.samples)


def training(name: str, environment: dict[str, str]) -> list[str]:
    """A training's command."""
    tracking = f"tracking.uri={environment['MLFLOW_TRACKING_URI']}"
    places = ["data.manifest=s3://cvft/data", "output=s3://cvft/runs", tracking]
    return ["train", "--config", "town", *places, *CONFIGURATION, *TRAININGS[name], f"name={name}"]


def history(uri: str, name: str) -> list[tuple[int, float]]:
    """All that MLflow has of the loss of steps, in the order in which it came."""
    from mlflow import MlflowClient  # noqa: PLC0415

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"attributes.run_name = '{name}'")
    return [(entry.step, entry.value) for entry in client.get_metric_history(run.info.run_id, "train/loss")]


def judge(out: Path, results: dict[str, Any], samples: list[tuple[float, dict[str, int]]]) -> int:
    checks, shown = {}, {}
    for name, result in results.items():
        runs = Runs(out / "runs", [])
        final, expected = Final.of(runs, name), Final.of(runs, undisturbed(name))
        logged = sorted(history(f"sqlite:///{out}/mlflow.db", undisturbed(name)))
        num_bytes = 4 * sum(weight.numel() for weight in expected.weights.values())
        loss, weight = final.differences(expected)
        steps = [step for step, _ in result["mlflow"]]
        published = [step for _, step in result["published"]]
        started = [line for _, line in result.pop("log") if "Started training worker group" in line]
        checks[name] = {
            "ended_well": result["exit_code"] == 0,
            "same": final.equals(expected)
            if name == "fixed"
            else is_the_same_to_rounding(final, expected, Final.of(runs, ALONE), result["cuts"]),
            "all_in_mlflow_once": sorted(steps) == [step for step, _ in logged],
            "published_once": published == sorted(set(published)),
            "groups": len(started) == 1 + sum(GROUPS[cut["kind"]] for cut in result["cuts"]),
            "over_the_link": name != "fixed" or min(result["sent_bytes"].values()) > len(expected.losses) * num_bytes,
        }
        if name == "fixed":
            checks[name]["mlflow_same"] = sorted(result["mlflow"]) == logged
        shown[name] = {"seconds": round(result["ended"] - result["began"], 1), "loss": loss, "weights": weight}
        shown[name]["megabytes_sent"] = {host: round(sent / 1e6, 1) for host, sent in result["sent_bytes"].items()}
    draw(out, results, samples)
    cuts = [cut for result in results.values() for cut in result["cuts"]]
    summary = {"checks": checks, "trainings": shown, "cuts": cuts, "gradient_bytes": num_bytes}
    (out / "hosts.json").write_text(json.dumps({**summary, "samples": samples, "results": results}, indent=1))
    print(json.dumps(summary))
    return 0 if all(all(found.values()) for found in checks.values()) else 1


def is_the_same_to_rounding(final: Final, expected: Final, alone: Final, cuts: list[dict[str, Any]]) -> bool:
    """Tell whether a training whose workers changed in number is the undisturbed one, up to the order of its sums."""
    grown = zip(final.differences(expected), alone.differences(expected), strict=True)
    if any(ours > MOST_GROWN * usual for ours, usual in grown):
        return False
    differences = (final.losses - expected.losses).abs()
    at = min((cut["at_step"] for cut in cuts), default=len(differences))
    soon = differences[at : at + NUM_STEPS_OF_ROUNDING]
    return bool((differences[:at] == 0).all() and (soon <= ROUNDING).all())


def draw(out: Path, results: dict[str, Any], samples: list[tuple[float, dict[str, int]]]) -> None:
    from pipeline.report.timeline import Mishap, Stage, timeline_figure  # noqa: PLC0415

    began = samples[0][0]
    stages = [Stage(name, result["began"] - began, result["ended"] - began) for name, result in results.items()]
    mishaps = [Mishap(cut["at"] - began, cut["host"]) for result in results.values() for cut in result["cuts"]]
    alive = [(at - began, nodes) for at, nodes in samples]
    figure = timeline_figure(
        alive, stages=stages, mishaps=mishaps, title=TITLE, group="host {}", mishap="a link is cut"
    )
    figure.savefig(out / "hosts.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("reference", "cut"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the town, the reference and the results")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/cvft-hosts"), help="of the hosts; its path must be short"
    )
    kinds = [kind for plan in PLANS.values() for kind in plan]
    parser.add_argument("--cuts", nargs="+", choices=kinds, default=kinds, help="do only these")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the hosts are taken down, whatever ends this
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if options.what == "reference":
        return reference(out)
    if (lack := subprocess.run([HOSTS, "check"], check=False).returncode) != 0:
        return lack
    return cut(out, options.folder, options.cuts)


if __name__ == "__main__":
    sys.exit(main())
