"""The town's ablation on one GPU, on a machine with torch and no Ray: town, shards and trainings in one call.

    PYTHONPATH=. python tests/bench/ablation_on_gpu.py --out results --pairs 12000 --processes 8

The same trainings as `cvft ablate`, in processes that share the GPU; each keeps the pixels there. Trainings run seed by
seed, and after `--limit-s` no further one begins: the comparison is made of what is finished, and says which seeds each
variant has. Prints the table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jobs.ablation import AblationConfig, TrialSpec, load_ablation, plan_trials, run_trial, write_comparison
from jobs.config import load
from jobs.entry import Progress, log_to_stderr
from pipeline.ablation import Trial
from pipeline.build import BuildOptions, build_shards
from pipeline.manifest import Manifest
from pipeline.plan import Cut
from pipeline.profile import preresized
from pipeline.runner import Processes
from pipeline.synthetic.write import TownConfig, write_town


def run_before(task: tuple[TrialSpec, float]) -> Trial | None:
    """Train, unless the time for beginning is over."""
    trial, until = task
    return run_trial(trial) if time.time() < until else None


def make_manifest(work: Path, spec: AblationConfig, *, num_pairs: int, cpus: int) -> Manifest:
    started = time.monotonic()
    write_town(work / "town", config=TownConfig(num_pairs=num_pairs), workers=cpus, progress=Progress("rendering"))
    print(f"town of {num_pairs:,} pairs: {time.monotonic() - started:.0f} s")
    started = time.monotonic()
    sizes = load(spec.base, ["data.manifest=unknown"]).preprocess
    cut = Cut(pairs_per_shard=250, profile=preresized(sizes.ground_size_px, sizes.aerial_size_px))
    made = build_shards(work / "town", str(work / "shards"), BuildOptions(cut=cut), runner=Processes(cpus))
    print(f"shards: {time.monotonic() - started:.0f} s")
    return Manifest.load(made.manifest)


def train_all(
    trials: Sequence[TrialSpec], *, processes: int, until: float, told: Callable[[list[Trial]], None]
) -> None:
    done: list[Trial] = []
    tasks = [(trial, until) for trial in trials]
    for _, trial in Processes(processes).run(run_before, tasks, lambda: None):
        if trial is not None:
            done.append(trial)
            print(f"{trial.variant}, seed {trial.seed}: R@1 {trial.metrics['recall_at_1']:.2%}", flush=True)
            told(done)
    print(f"{len(done)} of {len(trials)} trainings were done before the time was over")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="each specification's results go to a folder in it")
    parser.add_argument("--work", type=Path, default=Path("ablation-work"), help="town, shards and runs")
    parser.add_argument("--spec", default="town", help="names with commas between")
    parser.add_argument("--pairs", type=int, default=12_000)
    parser.add_argument("--seeds", type=int, help="so many, from 0 on")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--limit-s", type=float, default=400.0, help="no training begins later")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    until = time.time() + arguments.limit_s
    log_to_stderr()
    specs = [load_ablation(name) for name in arguments.spec.split(",")]
    manifest = make_manifest(arguments.work, specs[0], num_pairs=arguments.pairs, cpus=os.cpu_count() or 1)
    overrides = ["preprocess.decode_profile=preresized", "data.keep_pixels=device", *arguments.overrides]
    overrides += [f"train.use_gpu={str(arguments.device == 'cuda').lower()}"]
    splits = ", ".join(f"{number:,} {split}" for split, number in manifest.splits.items())
    where = f"the town ({splits}), manifest {manifest.digest[:16]}, on {_device(arguments.device)}"
    for spec in specs:
        if arguments.seeds:
            spec = replace(spec, seeds=tuple(range(arguments.seeds)))
        runs = str(arguments.work / "runs" / spec.name)
        trials = plan_trials(spec, manifest=manifest.uri, out=runs, overrides=overrides)
        epochs = "/".join(sorted({str(trial.config["train"]["num_epochs"]) for trial in trials}))
        about = f"Ablation {spec.name}: {where}; {epochs} epochs, recall at the last one."
        compare(spec, trials, arguments.out / spec.name, about=about, processes=arguments.processes, until=until)


def compare(
    spec: AblationConfig, trials: Sequence[TrialSpec], out: Path, *, about: str, processes: int, until: float
) -> None:
    started = time.monotonic()
    result: dict[str, Any] = {}

    def told(done: list[Trial]) -> None:
        comparable = [trial for trial in done if _has_reference(trial, done, spec)]
        if comparable:
            summaries, _ = write_comparison(spec, comparable, out, about=about)
            result.update(trainings=len(done), summaries=[summary.plain() for summary in summaries])

    train_all(trials, processes=processes, until=until, told=told)
    if result:
        print((out / "ablation.md").read_text(encoding="utf-8"))
    print(json.dumps({"spec": spec.name, "seconds": round(time.monotonic() - started, 1), **result}), flush=True)


def _has_reference(trial: Trial, done: list[Trial], spec: AblationConfig) -> bool:
    """Whether the reference was trained with this trial's seed: others cannot be compared yet."""
    return any(other.variant == spec.reference and other.seed == trial.seed for other in done)


def _device(name: str) -> str:
    return f"{os.cpu_count()} CPU cores" if name == "cpu" else str(torch.cuda.get_device_name())


if __name__ == "__main__":
    sys.exit(main())
