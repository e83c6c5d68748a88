"""Eight trials of `tune` tell a real MLflow server, which is killed for two minutes in the middle.

    python tests/bench/chaos_tracking.py                      # both searches; twelve minutes
    python tests/bench/chaos_tracking.py --searches disturbed # that of which the server is killed, alone

The server is that of infra/mlflow/server.sh: PostgreSQL, artifacts in Ceph, two processes. `disturbed` and `control`
are the same search of eight trials at a time (random values, tiny networks, thousands of steps); while `disturbed` is
under way all processes of MLflow are ended by SIGKILL and started again two minutes later. The server runs at the
lowest priority: on a machine of its own it would take nothing of the trainings' time.

What is in MLflow is held against what it was not told by: the loss of every step and the evaluations in each trial's
last checkpoint, the checkpoints that are there, the spools. Of the times, those of all intervals of ten steps while all
eight train: `step`, as the training measured it, and `wall`, from one interval's end to the next one's, in the windows
before, during and after the absence; of `control` in the windows at the same distance from its beginning.

Prints a table and one line of JSON; exits with 1 if anything is missing, double or different.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import yaml

from cvft.checkpoint import read_info, read_state
from jobs.run_file import RUN_FILE
from pipeline.build import BuildOptions, build_shards
from pipeline.plan import Cut
from pipeline.runner import Here
from pipeline.synthetic.write import TownConfig, write_town
from pipeline.tracking.runs import Run, opened
from pipeline.tracking.spool import Spool
from tests.mlflow_stack import MlflowStack

EVERY = 10  # steps that are told together
WINDOWS = ("before", "during", "after")
# `python -m jobs.tune` on a Ray with as many CPUs as trials, however few the machine has.
TUNE = """
import sys
import ray
from jobs import entry, tune
ray.init("local", num_cpus={num_trials}, include_dashboard=False, configure_logging=False)
sys.exit(entry.main(tune.JOB, sys.argv[1:]))
"""
SETTINGS = {
    "data.keep_pixels": "host",
    "preprocess.ground_size_px": [32, 176],
    "preprocess.aerial_size_px": [64, 64],
    "model.backbone.blocks": [1, 1, 1],
    "model.head.channels": 4,
    "train.batch_size": 4,
    "train.evaluate_every": 4,
    "tracking": {"log_every_steps": EVERY, "pictures": False},
}


@dataclass
class Search:
    """One search: where it is, when all its trials trained, when the server was away, what was wrong."""

    folder: Path
    num_trials: int
    process: subprocess.Popen[str]
    marks: dict[str, float] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    def wait_until_all_train(self) -> None:
        """Wait until every trial has told of its first steps; those that begin sooner are held until then.

        Imports take half a minute of a machine whose cores all train, and the trials shall train together.
        """
        held: dict[Path, int] = {}
        try:
            while len(held) < self.num_trials:
                assert self.process.poll() is None, f"the search ended early, see {self.folder}.log"
                for trial in _trials(self.folder):
                    if trial not in held and _has_begun(trial):
                        held[trial] = _process_of(trial)
                        os.kill(held[trial], signal.SIGSTOP)
                time.sleep(0.1)
        finally:
            for pid in held.values():
                os.kill(pid, signal.SIGCONT)
        self.marks["begin"] = time.time()

    def finish(self) -> None:
        """Wait for the end and read the result."""
        output, _ = self.process.communicate(timeout=900)
        assert self.process.returncode == 0, f"tune failed, see {self.folder}.log"
        self.result = json.loads(output.splitlines()[-1])

    def end(self) -> None:
        """End it, if it was not over."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=60)


def _has_begun(trial: Path) -> bool:
    return any(b"train/loss" in path.read_bytes() for path in _spools(trial))


def _process_of(trial: Path) -> int:
    """Return the process that has the trial's spool open."""
    spools = {str(path) for path in _spools(trial)}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # a process or a file that is gone
            if os.readlink(link) in spools:
                return int(link.parts[2])
    raise RuntimeError(f"{trial} trains in no process")


def _trials(folder: Path) -> list[Path]:
    return sorted((folder / "trials").glob("trial-*"))


def _spools(trial: Path) -> list[Path]:
    return [path for path in trial.rglob("outbox/*.jsonl") if not path.name.endswith(".refused.jsonl")]


def start_search(folder: Path, arguments: argparse.Namespace, *, manifest: str, uri: str) -> Search:
    """Start `tune` in a process of its own."""
    num_trials, settings = arguments.trials, {**SETTINGS, "train.num_epochs": arguments.epochs}
    spec = {
        "name": folder.name,
        "base": "town",
        "set": [f"{key}={json.dumps(value)}" for key, value in settings.items()],
        "space": {
            "train.loss.gamma": {"type": "float", "low": 3, "high": 30, "log": True},
            "train.optimizer.learning_rate": {"type": "float", "low": 3e-4, "high": 3e-3, "log": True},
        },
        "searcher": {"kind": "random"},
        "budget": {"trials": num_trials},
        "trial": {"max_concurrent": num_trials},
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(spec))
    command_line = ["--spec", file, "--manifest", manifest, "--out", folder, f"tracking.uri={uri}"]
    with folder.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", TUNE.format(num_trials=num_trials), *map(str, command_line)],
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    return Search(folder=folder, num_trials=num_trials, process=process)


def run_search(search: Search, server: MlflowStack, arguments: argparse.Namespace, *, is_disturbed: bool) -> None:
    """Let a search go by; end and start the server on the way, or only note when that would be."""
    search.wait_until_all_train()
    time.sleep(arguments.before_s)
    search.marks["away"] = time.time()
    if is_disturbed:
        server("kill")
    time.sleep(max(0.0, search.marks["away"] + arguments.away_s - time.time()))
    if is_disturbed:
        server("start")
    search.marks["back"] = time.time()
    search.finish()


def faults_of(trial: Path, search_run: str, artifacts: set[str]) -> Iterator[str]:
    """Yield what MLflow has otherwise than the trial's folder says."""
    run = opened(Run(**json.loads((trial / RUN_FILE).read_text())["run"]))
    stored = run.client.get_run(run.run_id)
    newest = sorted((trial / "checkpoints").iterdir())[-1]
    state, epochs = read_state(newest, "curve"), read_info(newest).training["epochs"]
    assert state is not None
    losses = state.tensors["losses"].tolist()
    ends = list(range(EVERY, len(losses) + 1, EVERY))
    means = {end: statistics.fmean(losses[end - EVERY : end]) for end in ends}
    if len(losses) % EVERY:
        means[len(losses)] = statistics.fmean(losses[ends[-1] :])
    history = [(metric.step, metric.value) for metric in run.client.get_metric_history(run.run_id, "train/loss")]
    if [step for step, _ in history] != list(means):
        missing, double = len(means.keys() - dict(history)), len(history) - len(dict(history))
        yield f"train/loss: {missing} steps missing, {double} double of {len(means)}"
    elif any(abs(value - means[step]) > 1e-9 for step, value in history):
        yield "train/loss: other values than the checkpoint's curve"
    for name in sorted(name for name in stored.data.metrics if name.startswith("train/")):
        steps = [metric.step for metric in run.client.get_metric_history(run.run_id, name)]
        if steps != list(means):
            yield f"{name}: {len(steps)} values, {len(means)} intervals"
    for name in (name for name in epochs[0] if name in stored.data.metrics):
        told = [(metric.step, metric.value) for metric in run.client.get_metric_history(run.run_id, name)]
        if told != [(epoch["step"], epoch[name]) for epoch in epochs]:
            yield f"{name}: {len(told)} values, {len(epochs)} evaluations, or other ones"
    yield from _model_faults(run, trial, epochs)
    if stored.info.status != "FINISHED" or stored.data.tags["mlflow.parentRunId"] != search_run:
        yield f"status {stored.info.status}, parent {stored.data.tags.get('mlflow.parentRunId')}"
    if len(stored.inputs.dataset_inputs) != 2:
        yield f"{len(stored.inputs.dataset_inputs)} datasets"
    for name in ("config.json", "environment.txt"):
        if not any(run.run_id in key and key.endswith(f"/artifacts/{name}") for key in artifacts):
            yield f"{name} is not in the bucket"
    for path in _spools(trial):
        spool = Spool(path)
        if spool.num_pending:
            yield f"{spool.num_pending} entries wait in {path}"
        if path.with_suffix(".refused.jsonl").exists():
            yield f"MLflow refused entries of {path}"


def _model_faults(run: Run, trial: Path, epochs: list[dict[str, Any]]) -> Iterator[str]:
    experiment = run.client.get_run(run.run_id).info.experiment_id
    models = run.client.search_logged_models([experiment], f"source_run_id = '{run.run_id}'")
    found = sorted(
        (
            model.params["step"],
            {metric.key: metric.value for metric in model.metrics}["recall_at_1"],
            model.status.value,
        )
        for model in models
    )
    if found != sorted((str(epoch["step"]), epoch["recall_at_1"], "READY") for epoch in epochs):
        yield f"{len(models)} external models for {len(epochs)} evaluations, or other ones"
    kept = {Path(model.tags["checkpoint_uri"]).name for model in models if model.tags["is_kept"] == "true"}
    there = {path.name for path in (trial / "checkpoints").iterdir()}
    if kept != there:
        yield f"is_kept says {sorted(kept)}, there are {sorted(there)}"


def times_of(folder: Path, marks: dict[str, float]) -> dict[str, dict[str, list[float]]]:
    """Return milliseconds per step by window, of every interval of every trial while all train."""
    intervals = []
    for trial in _trials(folder):
        run = opened(Run(**json.loads((trial / RUN_FILE).read_text())["run"]))
        history = run.client.get_metric_history(run.run_id, "train/step_s")
        ends = [metric.timestamp / 1000 for metric in history]
        walls = [(end - begin) / EVERY for begin, end in itertools.pairwise(ends)]
        intervals.append(list(zip(ends[1:], [metric.value for metric in history[1:]], walls, strict=True)))
    marks = {**marks, "end": min(trial[-1][0] for trial in intervals)}
    edges = {"before": ("begin", "away"), "during": ("away", "back"), "after": ("back", "end")}
    found: dict[str, dict[str, list[float]]] = {}
    for window, (first, last) in edges.items():
        inside = [each for trial in intervals for each in trial if marks[first] <= each[0] < marks[last]]
        found[window] = {"step": [1000 * step for _, step, _ in inside], "wall": [1000 * wall for _, _, wall in inside]}
    return found


def report(folder: Path, marks: dict[str, float], result: dict[str, Any], artifacts: set[str]) -> dict[str, Any]:
    """Print and return what became of a search."""
    name = folder.name
    faults = {trial.name: list(faults_of(trial, result["run_id"], artifacts)) for trial in _trials(folder)}
    for trial, found in faults.items():
        for fault in found:
            print(f"{name} {trial}: {fault}")
    times = times_of(folder, marks)
    row: dict[str, Any] = {
        "num_trials": len(faults),
        "away_s": round(marks["back"] - marks["away"], 1),
        "num_faults": sum(map(len, faults.values())),
        "search": result["trials"],
    }
    for window in WINDOWS:
        medians = {kind: statistics.median(values) for kind, values in times[window].items() if values}
        row[window] = {"num_intervals": len(times[window]["step"]), **{k: round(v, 3) for k, v in medians.items()}}
        shares = {
            kind: medians[kind] / statistics.median(times["before"][kind]) for kind in medians if times["before"][kind]
        }
        row[window]["share_of_before"] = {kind: round(share, 4) for kind, share in shares.items()}
        print(
            f"{name:10}{window:8}{len(times[window]['step']):7} intervals"
            + "".join(f"{kind:>7} {medians[kind]:8.3f} ms {shares[kind]:7.4f}" for kind in medians)
        )
    return row


def measure(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the searches that were not run in this folder before, and return what became of all."""
    root.chmod(0o711)
    (root / "mlflow").mkdir(exist_ok=True)
    manifest = _manifest(root)
    server = MlflowStack(root / "mlflow", prefix=("nice", "-n", "19"))
    rows = {}
    try:
        found = server("start")
        for name in arguments.searches:
            marks = root / f"{name}.marks.json"
            if not marks.exists():
                search = start_search(root / name, arguments, manifest=manifest, uri=found["MLFLOW_TRACKING_URI"])
                try:
                    run_search(search, server, arguments, is_disturbed=name == "disturbed")
                finally:
                    search.end()
                marks.write_text(json.dumps({"marks": search.marks, "result": search.result}))
            told = json.loads(marks.read_text())
            rows[name] = report(root / name, told["marks"], told["result"], _keys(found))
    finally:
        server("stop")
    return rows


def _manifest(root: Path) -> str:
    """Return the manifest of a small town in shards, made where it is missing."""
    if not (root / "town").exists():
        write_town(root / "town", config=TownConfig(num_pairs=240, seed=1), workers=2)
    return build_shards(
        root / "town", str(root / "shards"), BuildOptions(cut=Cut(pairs_per_shard=60)), runner=Here()
    ).manifest


def main() -> int:
    """Run the searches, look, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", nargs="+", choices=["disturbed", "control"], default=["disturbed", "control"])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=48)
    parser.add_argument("--before-s", type=float, default=35.0)
    parser.add_argument("--away-s", type=float, default=120.0)
    parser.add_argument("--out", type=Path, help="folder that stays; a search that was run there is only looked at")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends too
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        root = arguments.out or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        rows = measure(root.absolute(), arguments)
    is_right = all(row["num_faults"] == 0 and row["num_trials"] == arguments.trials for row in rows.values())
    print(json.dumps({"benchmark": "chaos_tracking", "is_met": is_right, **rows}))
    return 0 if is_right else 1


def _keys(found: dict[str, str]) -> set[str]:
    """Names of all objects in the artifacts' bucket."""
    client = boto3.session.Session(found["AWS_ACCESS_KEY_ID"], found["AWS_SECRET_ACCESS_KEY"]).client(
        "s3", endpoint_url=found["AWS_ENDPOINT_URL"], region_name=found["AWS_REGION"]
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
    return {item["Key"] for page in pages for item in page.get("Contents", [])}


if __name__ == "__main__":
    sys.exit(main())
