"""Everything at once on a synthetic town: raw images -> shards -> training -> evaluation -> report -> champion.

    python -m jobs.demo --out demo

Each stage is finished once: started again, the demo goes on where it stopped, or says that it is up to date.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cvft.configuration import to_plain
from cvft.errors import ConfigError
from jobs import entry, evaluate
from jobs.cluster import ray_session
from jobs.config import ExperimentConfig, load
from jobs.measuring import Protocol
from jobs.promote import Rules, load_gate, promote
from jobs.report import write_report
from jobs.shard import ShardingProgress
from jobs.train import register, train
from pipeline.build import BuildOptions, build_shards
from pipeline.evaluation import evaluate_checkpoint
from pipeline.plan import Cut
from pipeline.ray_tasks import OnRay
from pipeline.synthetic.write import TownConfig, write_town
from pipeline.tracking.runs import Run
from pipeline.tracking.versions import Registry

Result = dict[str, Any]
NAME = "cvft"
GATE = "demo"
LICENCE = "a synthetic town, rendered by this project; its images carry the code's licence, Apache-2.0"
_OWN_PLACES = ("output=", "data.manifest=", "tracking.")


class Stages:
    """Remembers in a JSON file which stages are done, with what input and what result."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._done = self._read()
        self.num_run = 0

    def _read(self) -> dict[str, Any]:
        if not self._file.exists():
            return {}
        try:
            return dict(json.loads(self._file.read_text()))
        except ValueError:
            entry.LOGGER.warning("%s is damaged: every stage looks at its files anew", self._file)
            return {}

    def run(self, name: str, inputs: Result, work: Callable[[], Result]) -> Result:
        """Return the stage's result, doing the work only if its inputs changed or files it made are gone.

        Args:
            name: The stage's name.
            inputs: Plain data that decides the result.
            work: Makes the result; what it lists under `files` must exist for the stage to count as done.
        """
        fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        known = self._done.get(name)
        if known and known["inputs"] == fingerprint and all(Path(file).exists() for file in known["result"]["files"]):
            entry.LOGGER.info("%s: up to date", name)
            return dict(known["result"])
        entry.LOGGER.info("%s: begins", name)
        started = time.monotonic()
        result = work()
        self.num_run += 1
        entry.LOGGER.info("%s: done in %.1f s", name, time.monotonic() - started)
        self._done[name] = {"inputs": fingerprint, "result": result}
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._done, indent=2))
        temporary.replace(self._file)
        return result


def demo(out: Path, *, town: TownConfig, config: ExperimentConfig) -> Result:
    """Run what is missing of the demo in the folder `out` and return what there is at the end."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(out / "demo.json")
    raw = stages.run("synthesize", dataclasses.asdict(town), lambda: _synthesize(out, town))
    with contextlib.ExitStack() as rays:  # sharding and training share one Ray, begun when the first of them needs it

        def on_ray(work: Callable[[], Result]) -> Result:
            rays.enter_context(ray_session(num_cpus=config.train.max_workers))
            return work()

        sharded = stages.run("shard", raw, lambda: on_ray(lambda: _shard(out)))
        config = _for_this_data(config, sharded, out)
        trained = stages.run("train", to_plain(config), lambda: on_ray(lambda: _train(config)))
    measured = stages.run("evaluate and report", trained, lambda: _evaluate_and_report(out, config, trained))
    registered = stages.run("register", trained, lambda: _register(config, trained))
    inputs = {**registered, "gate": to_plain(load_gate(GATE))}
    promoted = stages.run("promote", inputs, lambda: _promote(config, registered))
    if not stages.num_run:
        entry.LOGGER.info("everything is up to date; delete %s to begin anew", out)
    _tell(measured, promoted, config)
    return {
        **measured["metrics"],
        "report": measured["report"],
        "model": promoted["model"],
        "version": promoted["version"],
        "candidate": registered["version"],
        "verdict": promoted["verdict"],
        "run_id": trained["run_id"],
        "checkpoint": trained["checkpoint"],
        "manifest": sharded["manifest"],
        "digest": sharded["digest"],
        "seconds": round(time.monotonic() - started, 1),
    }


def _for_this_data(config: ExperimentConfig, sharded: Result, out: Path) -> ExperimentConfig:
    """Point the preset at the demo's shards; another configuration or dataset is another run."""
    database = f"sqlite:///{out / 'mlflow.db'}"
    tracking = dataclasses.replace(config.tracking, uri=database, registered_model=NAME, pictures=False)
    data = dataclasses.replace(config.data, manifest=sharded["manifest"])
    config = dataclasses.replace(config, data=data, tracking=tracking, output=str(out / "runs"))
    plain = json.dumps([to_plain(config), sharded["digest"]], sort_keys=True)
    return dataclasses.replace(config, name=f"{config.name}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}")


def _synthesize(out: Path, town: TownConfig) -> Result:
    made = write_town(out / "town", config=town, workers=os.cpu_count() or 1, progress=entry.Progress("rendering"))
    return {**dataclasses.asdict(made), "root": str(out / "town"), "files": [str(out / "town")]}


def _shard(out: Path) -> Result:
    options = BuildOptions(cut=Cut(pairs_per_shard=200))
    made = build_shards(out / "town", str(out / "shards"), options, runner=OnRay(), progress=ShardingProgress())
    return {"manifest": made.manifest, "digest": made.digest, "files": [made.manifest]}


def _train(config: ExperimentConfig) -> Result:
    # A stage of its own registers what is trained here, and says of what licence the data are.
    result = train(dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, registered_model=None)))
    return {**result, "files": [result["checkpoint"], *_database(config)]}


def _evaluate_and_report(out: Path, config: ExperimentConfig, trained: Result) -> Result:
    found = evaluate_checkpoint(trained["checkpoint"], config.data.manifest, split=config.data.eval_split)
    files = write_report(
        found, out / "report", title="A town never seen: which aerial image shows this place?", facts=_facts(trained)
    )
    _run_of(config, trained).log_artifacts([files.html, *files.pngs], artifact_path="report")
    return {
        "metrics": found.metrics(),
        "one_percent_k": found.result.one_percent_k,
        "report": str(files.html),
        "files": [str(files.html), *map(str, files.pngs)],
    }


def _register(config: ExperimentConfig, trained: Result) -> Result:
    made = register(config, _run_of(config, trained), trained, data_licence=LICENCE)
    return {**made, "files": _database(config)}


def _promote(config: ExperimentConfig, registered: Result) -> Result:
    """Hold the new version against the champion of this folder, if there is one; no champion at all is possible too."""
    registry = Registry(config.tracking.uri, NAME)
    protocol = Protocol(
        manifest=config.data.manifest, split=config.data.eval_split, train_split=config.data.train_split
    )
    rules = Rules(protocol=protocol, gate=load_gate(GATE), gate_name=GATE)
    result = promote(registry, registry.version(registered["version"]), rules)
    return {**{key: result[key] for key in ("status", "verdict", "model", "version")}, "files": _database(config)}


def _run_of(config: ExperimentConfig, trained: Result) -> Run:
    return Run(uri=config.tracking.uri, run_id=trained["run_id"])


def _database(config: ExperimentConfig) -> list[str]:
    return [config.tracking.uri.removeprefix("sqlite:///")]


def _facts(trained: Result) -> dict[str, object]:
    return {
        "choice": f"the epoch with the highest recall@1 of {trained['epochs_done']} epochs, on this very split",
        "MLflow run": trained["run_id"],
        "pairs per second in training": f"{trained['pairs_per_s']:.1f}",
    }


def _tell(measured: Result, promoted: Result, config: ExperimentConfig) -> None:
    table = evaluate.recall_table(measured["metrics"], measured["one_percent_k"])
    champion = f"{promoted['model']}, version {promoted['version']}" if promoted["model"] else "none yet"
    entry.LOGGER.info(
        "\n\n%s\n\n  report            %s\n  verdict           %s\n  champion          %s\n  all runs          %s\n",
        table,
        measured["report"],
        promoted["verdict"],
        champion,
        f"{Path(sys.executable).with_name('mlflow')} ui --backend-store-uri {config.tracking.uri}",
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=entry.local_path, default=Path("demo"), help="folder for everything (default: demo)"
    )
    parser.add_argument("--pairs", type=int, default=800, help="pairs of the town, train and val together")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another town")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the preset: train.num_epochs=2")


def _checked(arguments: argparse.Namespace) -> tuple[TownConfig, ExperimentConfig]:
    for override in arguments.overrides:
        if override.startswith(_OWN_PLACES):
            raise ConfigError(f"{override}: the demo keeps everything in --out; name a folder there")
    town = TownConfig(num_pairs=arguments.pairs, seed=arguments.seed)
    # The manifest is not there yet; the name is filled in when it is.
    return town, load("town", ["data.manifest=unknown", *arguments.overrides])


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    _checked(arguments)
    return entry.plain(arguments)


def _run(arguments: argparse.Namespace) -> Result:
    town, config = _checked(arguments)
    return demo(arguments.out.absolute(), town=town, config=config)


JOB = entry.Job(
    name="demo",
    summary="Everything at once on a synthetic town, from raw images to a champion and a report.",
    example="cvft demo --out demo",
    add_arguments=_add_arguments,
    run=_run,
    resolve=_resolve,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
