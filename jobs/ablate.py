"""Compare variants of the network or the recipe on the same pairs, with several seeds: one table and one picture.

    python -m jobs.ablate --spec town --pairs 800 --out ablation

A variant is a set of overrides (see `jobs/ablations/`). Started again, it does only the trainings that are missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from cvft.configuration import to_plain
from cvft.errors import ConfigError
from jobs import entry
from jobs.ablation import AblationConfig, AblationFiles, load_ablation, plan_trials, run_trials, write_comparison
from jobs.cluster import ray_session
from jobs.commit import code_commit
from jobs.config import load
from jobs.shard import ShardingProgress
from pipeline.ablation import VariantSummary
from pipeline.build import BuildOptions, build_shards
from pipeline.manifest import Manifest
from pipeline.plan import Cut
from pipeline.ray_tasks import OnRay
from pipeline.runner import Processes, Runner
from pipeline.synthetic.write import TownConfig, write_town
from pipeline.tracking.runs import open_run
from pipeline.tracking.server import prepare


def ablate(
    spec: AblationConfig, *, manifest: str, out: Path, runner: Runner, overrides: list[str], num_threads: int
) -> dict[str, Any]:
    """Do the trainings that are missing, compare all, and record the comparison as an MLflow run.

    Raises:
        CvftError: A configuration, the data or a store cannot be used.
    """
    opened = Manifest.load(manifest)
    trials = plan_trials(spec, manifest=opened.uri, out=str(out / "runs"), overrides=overrides, num_threads=num_threads)
    done = run_trials(trials, runner)
    splits = ", ".join(f"{number:,} {split}" for split, number in opened.splits.items())
    epochs = sorted({trial.config["train"]["num_epochs"] for trial in trials})
    about = (
        f"Ablation {spec.name}: {opened.layout} pairs ({splits}), manifest {opened.digest[:16]}; "
        f"{' or '.join(map(str, epochs))} epochs, recall at the last one."
    )
    summaries, files = write_comparison(spec, done, out, about=about)
    entry.LOGGER.info("\n\n%s\n  picture  %s\n", files.table.read_text(encoding="utf-8"), files.picture)
    return {
        "run_id": _record(spec, opened, summaries, files, overrides=overrides, out=out),
        "table": str(files.table),
        "picture": str(files.picture),
        "numbers": str(files.numbers),
        "digest": opened.digest,
        "trainings": len(done),
        **{summary.variant: summary.plain() for summary in summaries},
    }


def _record(
    spec: AblationConfig,
    manifest: Manifest,
    summaries: list[VariantSummary],
    files: AblationFiles,
    *,
    overrides: list[str],
    out: Path,
) -> str:
    """Log the comparison to MLflow and return its run."""
    base = load(spec.base, [f"data.manifest={manifest.uri}", *overrides])
    tracking = prepare(base.tracking.uri, experiment=base.tracking.experiment)
    run = open_run(
        tracking,
        name=f"ablation-{spec.name}",
        identity=str(out.absolute()),
        config=to_plain(spec),
        commit=code_commit(),
        tags={"manifest_digest": manifest.digest},
    )
    for number, summary in enumerate(summaries):
        run.log_metrics({f"mean.{name}": value for name, value in summary.means.items()}, step=number)
    run.set_tags({f"variant.{number}": summary.variant for number, summary in enumerate(summaries)})
    run.log_artifacts(list(asdict(files).values()), artifact_path="ablation")
    run.finish()
    return run.run_id


def make_town(out: Path, num_pairs: int, seed: int, runner: Runner) -> str:
    """Write the town and its shards where they are missing, and return the manifest."""
    town = TownConfig(num_pairs=num_pairs, seed=seed)
    write_town(out / "town", config=town, workers=os.cpu_count() or 1, progress=entry.Progress("rendering"))
    options = BuildOptions(cut=Cut(pairs_per_shard=500))
    return build_shards(out / "town", str(out / "shards"), options, runner=runner, progress=ShardingProgress()).manifest


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", default="town", help="YAML file, or a name in jobs/ablations (default: town)")
    parser.add_argument(
        "--out", type=entry.local_path, required=True, help="folder for the runs, the table and the picture"
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--manifest", help="train on these pairs instead of a town")
    data.add_argument("--pairs", type=int, default=800, help="pairs of the town, train and val together (default: 800)")
    parser.add_argument("--town-seed", type=int, default=0, help="another seed is another town")
    parser.add_argument("--seeds", type=int, help="so many seeds, from 0 on, instead of the specification's")
    parser.add_argument("--processes", type=int, help="train in so many processes of this machine instead of on Ray")
    parser.add_argument("--threads", type=int, default=1, help="threads of each training (default: 1)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to all variants: train.num_epochs=4")


def _checked(arguments: argparse.Namespace) -> AblationConfig:
    """Return what is compared; every configuration is resolved before the first pair is rendered."""
    spec = load_ablation(arguments.spec)
    if arguments.seeds is not None:
        spec = replace(spec, seeds=tuple(range(arguments.seeds)))
    if arguments.threads < 1:
        raise ConfigError(f"--threads {arguments.threads}: at least 1 is needed")
    plan_trials(spec, manifest="unknown", out=str(arguments.out / "runs"), overrides=arguments.overrides)
    return spec


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    return {**entry.plain(arguments), "ablation": to_plain(_checked(arguments))}


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    spec = _checked(arguments)
    out = arguments.out.absolute()
    runner: Runner = (
        Processes(arguments.processes)
        if arguments.processes is not None
        else OnRay(session=partial(ray_session, has_dashboard=False))
    )
    manifest = arguments.manifest or make_town(out, arguments.pairs, arguments.town_seed, runner)
    return ablate(
        spec,
        manifest=manifest,
        out=out,
        runner=runner,
        overrides=arguments.overrides,
        num_threads=arguments.threads,
    )


JOB = entry.Job(
    name="ablate",
    summary="Train variants on the same pairs with several seeds and compare them: one table, one picture.",
    example="cvft ablate --spec town --pairs 800 --out ablation",
    add_arguments=_add_arguments,
    run=_run,
    resolve=_resolve,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
