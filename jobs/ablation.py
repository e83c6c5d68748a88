"""Which trainings an ablation is made of, one of them, and all of them; needs neither Ray nor MLflow.

A specification names a base configuration and, for each variant, what differs from it. Each variant is trained once
with every seed, as a run with a folder of its own, so that an ablation that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cvft.checkpoint import read_info
from cvft.configuration import parse, require, to_plain
from cvft.errors import ConfigError
from jobs import run_file
from jobs.config import ExperimentConfig, load, read_specification
from jobs.entry import LOGGER
from jobs.training import worker
from jobs.training.progress import Metrics, read_history
from jobs.training.saving import checkpoints_of
from pipeline.ablation import Trial, VariantSummary, summarise
from pipeline.cache import default_cache
from pipeline.checkpoints import fetch
from pipeline.manifest import Manifest
from pipeline.report.ablation import ablation_figure, ablation_table
from pipeline.report.style import rasterise
from pipeline.runner import Runner

ABLATIONS = Path(__file__).parent / "ablations"


@dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """What a variant changes.

    Attributes:
        config: Preset or file that it starts from; none is the ablation's base.
        set: Dotted overrides, `key=value`.
    """

    config: str | None = None
    set: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """A specification.

    Attributes:
        name: Names the ablation's folder and run.
        base: Preset or file that the variants start from.
        reference: Name of the variant that the others are compared with.
        seeds: Seeds of the trainings of each variant.
        metric: What variants are compared by.
        variants: By name.
    """

    name: str
    base: str
    reference: str
    seeds: tuple[int, ...]
    variants: dict[str, VariantConfig]
    metric: str = "recall_at_1"

    def __post_init__(self) -> None:
        require(len(self.seeds) >= 1, "seeds: name at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds: {list(self.seeds)} names a seed twice")
        require(
            self.reference in self.variants,
            f"reference: {self.reference!r} is not one of the variants {', '.join(map(repr, self.variants))}",
        )


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One training to be done, as plain data that travels to other processes.

    Attributes:
        variant: Name of its variant.
        seed: Its seed.
        config: The resolved configuration.
        num_threads: Threads that torch computes with.
    """

    variant: str
    seed: int
    config: dict[str, Any]
    num_threads: int = 1


def load_ablation(file: str) -> AblationConfig:
    """Read a specification.

    Args:
        file: A YAML file, or the name of one in `jobs/ablations/`.

    Raises:
        ConfigError: It cannot be read, or a key or value is refused.
    """
    return parse(AblationConfig, read_specification(file, folder=ABLATIONS, what="ablation"))


def plan_trials(
    spec: AblationConfig, *, manifest: str, out: str, overrides: Sequence[str] = (), num_threads: int = 1
) -> list[TrialSpec]:
    """Resolve the configurations of all trainings, seed by seed, so that an early end has whole comparisons.

    Args:
        spec: The specification.
        manifest: Path or URI of the manifest, or of a store.
        out: Folder or URI for the runs.
        overrides: Changes for all variants; what a variant itself sets wins.
        num_threads: Threads of each training.

    Raises:
        ConfigError: A configuration is refused; names the variant.
    """
    trials = []
    for seed in spec.seeds:
        for number, (name, variant) in enumerate(spec.variants.items()):
            own = [
                f"train.seed={seed}",
                f"name=variant-{number:02d}-seed-{seed}",
                f"output={out}",
                f"data.manifest={manifest}",
                "train.workers=1",
            ]
            try:
                config = load(variant.config or spec.base, [*overrides, *variant.set, *own]).located()
            except ConfigError as error:
                raise ConfigError(f"variants.{name}: {error}") from error
            trials.append(TrialSpec(variant=name, seed=seed, config=to_plain(config), num_threads=num_threads))
    return trials


def run_trial(trial: TrialSpec) -> Trial:
    """Train, or go on training, in this process; returns the numbers of the last evaluation.

    Raises:
        ConfigError: Its folder holds another training: of another specification, other overrides or other data.
        CvftError: The data or a checkpoint cannot be used, or the training diverged.
    """
    torch.set_num_threads(trial.num_threads)
    config = parse(ExperimentConfig, trial.config)
    run_file.enter(config, Manifest.load(config.data.manifest), remedy=f"choose another --out for {trial.variant!r}")
    device = torch.device("cuda" if config.train.use_gpu else "cpu")
    worker.train(config, device=device, on_epoch=_ignore)
    checkpoints = checkpoints_of(config)
    info = read_info(fetch(checkpoints.uri(checkpoints.names()[-1]), cache=default_cache().parent))
    return Trial(variant=trial.variant, seed=trial.seed, metrics=read_history(info)[-1])


def _ignore(metrics: Metrics) -> None:
    """Nothing is told between the epochs: the driver tells of whole trainings."""


@dataclass(frozen=True, kw_only=True)
class AblationFiles:
    """What an ablation leaves behind.

    Attributes:
        table: The comparison in Markdown.
        picture: Every training as a dot, PNG.
        numbers: Everything as JSON.
    """

    table: Path
    picture: Path
    numbers: Path


def run_trials(trials: Sequence[TrialSpec], runner: Runner) -> list[Trial]:
    """Do all trainings; those that are finished are only read.

    Raises:
        CvftError: One of them cannot be done; the others' checkpoints stay.
    """
    done: dict[int, Trial] = {}
    for number, trial in runner.run(run_trial, trials, _ignore_tick):
        done[number] = trial
        LOGGER.info(
            "training %d/%d: %s, seed %d: R@1 %.2f %%",
            len(done),
            len(trials),
            trial.variant,
            trial.seed,
            100 * trial.metrics["recall_at_1"],
        )
    return [done[number] for number in range(len(trials))]


def _ignore_tick() -> None:
    """A training takes minutes; a line for each is enough."""


def write_comparison(
    spec: AblationConfig, trials: Sequence[Trial], out: Path, *, about: str
) -> tuple[list[VariantSummary], AblationFiles]:
    """Compare the trainings and write the table, the picture and the numbers into `out`.

    Args:
        spec: The specification.
        trials: All trainings.
        out: Local folder.
        about: One sentence on what was trained on.
    """
    places = list(spec.variants)
    ordered = sorted(trials, key=lambda trial: (places.index(trial.variant), trial.seed))
    summaries = summarise(ordered, reference=spec.reference, metric=spec.metric)
    out.mkdir(parents=True, exist_ok=True)
    files = AblationFiles(table=out / "ablation.md", picture=out / "ablation.png", numbers=out / "ablation.json")
    files.table.write_text(f"{about}\n\n{ablation_table(summaries, metric=spec.metric)}", encoding="utf-8")
    chance = trials[0].metrics["chance"] if spec.metric == "recall_at_1" else None
    figure = ablation_figure(summaries, metric=spec.metric, chance=chance, subtitle=about)
    rasterise(figure).save(files.picture)
    numbers = {
        "about": about,
        "specification": to_plain(spec),
        "summaries": [summary.plain() for summary in summaries],
        "trials": [dataclasses.asdict(trial) for trial in ordered],
    }
    files.numbers.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return summaries, files
