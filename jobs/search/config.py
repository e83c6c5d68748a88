"""The specification of a search: what is searched, by whom, who is stopped early, and when it is enough.

Specifications are YAML files; those of `jobs/searches/` go by their names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cvft.configuration import parse, require
from cvft.errors import ConfigError
from jobs.config import ExperimentConfig, load, read_specification
from jobs.search.parameter import ParameterConfig
from jobs.search.space import Space
from pipeline.ablation import RECALLS

SEARCHES = Path(__file__).parent.parent / "searches"
# What population-based training changes under weights that stay: nothing that the network or the order of pairs is
# made of.
_MUTABLE = ("train.loss.", "train.optimizer.", "train.augment.")
_FIXED = ("train.loss.kind", "train.optimizer.kind")


@dataclass(frozen=True, kw_only=True)
class SearcherConfig:
    """Who proposes the values of a trial.

    Attributes:
        kind: `random`; `optuna` is its tree-structured Parzen estimator (TPE), which learns from the trials so far;
            `grid` takes every combination once.
        seed: The same seed proposes the same; for `optuna` as long as the trials' numbers are the same.
        num_random: Trials that `optuna` proposes at random before it learns.
    """

    kind: Literal["random", "optuna", "grid"] = "random"
    seed: int = 0
    num_random: int = 10

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed: {self.seed} must not be negative")
        require(self.num_random >= 1, f"num_random: {self.num_random} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Who is stopped early.

    Attributes:
        kind: `none` trains all to the end. `asha` (asynchronous successive halving, Li et al. 2020) compares trials
            after `grace_epochs` and after each `reduction_factor` times as many, and lets the best `1/reduction_factor`
            of those that came so far go on. `median` stops a trial whose best is below the median of the others' means.
            `pbt` (population-based training, Jaderberg et al. 2017) stops none: every `perturb_every` epochs the worst
            of the population take over weights and values of the best, and change the values a little.
        grace_epochs: No trial is stopped before so many epochs.
        reduction_factor: See `asha`.
        min_samples: `median` stops none before so many others have come as far.
        perturb_every: See `pbt`.
        quantile: Share of the population that `pbt` replaces, and takes the best from.
        resample: Probability that `pbt` draws a value anew instead of changing it a little.
        is_synchronous: All of the population wait for each other before `pbt` compares them. Without it each is
            compared with the others as they stand, and nobody waits; where trainings are short, or take turns, those
            that began first may have ended before others begin.
    """

    kind: Literal["none", "asha", "median", "pbt"] = "none"
    grace_epochs: int = 1
    reduction_factor: float = 3.0
    min_samples: int = 3
    perturb_every: int = 2
    quantile: float = 0.25
    resample: float = 0.25
    is_synchronous: bool = False

    def __post_init__(self) -> None:
        for name in ("grace_epochs", "min_samples", "perturb_every"):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} must be at least 1")
        require(self.reduction_factor > 1, f"reduction_factor: {self.reduction_factor} must be more than 1")
        require(0 < self.quantile <= 0.5, f"quantile: {self.quantile} must lie in (0, 0.5]")
        require(0 <= self.resample <= 1, f"resample: {self.resample} is a probability and must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """When it is enough: whichever comes first; over all starts of the search.

    Attributes:
        trials: Number of trials; a grid without it takes all of its points.
        hours: Time for which the search runs.
        gpu_hours: The trials' time times their GPUs.
    """

    trials: int | None = None
    hours: float | None = None
    gpu_hours: float | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "hours", "gpu_hours"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}: {value} must be positive, or null for no limit")


@dataclass(frozen=True, kw_only=True)
class SearchTrialConfig:
    """What each trial gets.

    Attributes:
        workers: Ray Train workers of a trial; 1 trains in the trial's own actor.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker; a fraction shares one; 0 trains on the CPU.
        threads: Threads that torch computes with in each worker on the CPU.
        max_concurrent: Trials at a time, at most; none is as many as there is room for. A cluster with an autoscaler is
            asked for the nodes of all of them at once, and with none for one trial's after the other.
        max_failures: Times that a trial is tried again after a worker was lost or failed; not after a user's error, and
            not after a loss that is not finite.
    """

    workers: int = 1
    cpus: int = 1
    gpus: float = 0.0
    threads: int = 1
    max_concurrent: int | None = None
    max_failures: int = 2

    def __post_init__(self) -> None:
        for name in ("workers", "cpus", "threads"):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} must be at least 1")
        require(self.gpus >= 0, f"gpus: {self.gpus} must not be negative")
        concurrent = self.max_concurrent
        require(concurrent is None or concurrent >= 1, f"max_concurrent: {concurrent} must be at least 1")
        require(self.max_failures >= 0, f"max_failures: {self.max_failures} must not be negative")
        is_alone = self.workers == 1
        require(is_alone or self.cpus == 1, f"cpus: {self.cpus}: each of several workers has one CPU")
        require(
            is_alone or self.gpus in (0, 1), f"gpus: {self.gpus:g}: each of several workers has a whole GPU or none"
        )


@dataclass(frozen=True, kw_only=True)
class FinalConfig:
    """The comparison at the end.

    Attributes:
        seeds: The base and the winner are trained anew with each of these, which the search has not used; none compares
            nothing.
    """

    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(len(set(self.seeds)) == len(self.seeds), f"seeds: {list(self.seeds)} names a seed twice")
        require(all(seed >= 0 for seed in self.seeds), f"seeds: {list(self.seeds)} must not be negative")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A specification.

    Attributes:
        name: Names the search, its run and its best configuration.
        base: Preset or file that every trial starts from.
        set: Dotted overrides of the base, `key=value`.
        metric: What trials are compared by; larger is better. A trial counts with its best evaluation.
        space: What is searched, by dotted key.
        searcher: See `SearcherConfig`.
        scheduler: See `SchedulerConfig`.
        budget: See `BudgetConfig`.
        trial: See `SearchTrialConfig`.
        final: See `FinalConfig`.
    """

    name: str
    base: str
    set: tuple[str, ...] = ()
    metric: str = "recall_at_1"
    space: dict[str, ParameterConfig]
    searcher: SearcherConfig = field(default_factory=SearcherConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    trial: SearchTrialConfig = field(default_factory=SearchTrialConfig)
    final: FinalConfig = field(default_factory=FinalConfig)

    def __post_init__(self) -> None:
        require(self.metric in RECALLS, f"metric: {self.metric!r} is not one of {', '.join(RECALLS)}")
        kind, budget = self.searcher.kind, self.budget
        is_bounded = any(limit is not None for limit in (budget.trials, budget.hours, budget.gpu_hours))
        require(is_bounded or kind == "grid", f"budget: a search by {kind} needs trials, hours or gpu_hours")
        require(budget.gpu_hours is None or self.trial.gpus > 0, "budget.gpu_hours: trial.gpus is 0")
        if self.scheduler.kind == "pbt":
            self._check_population()

    def _check_population(self) -> None:
        require(
            self.searcher.kind == "random",
            f"searcher.kind: {self.searcher.kind}: a population (scheduler.kind=pbt) starts at random",
        )
        require(
            self.trial.workers == 1, "trial.workers: pbt hands weights from trial to trial, which train in one actor"
        )
        most = self.trial.max_concurrent
        require(most is None, f"trial.max_concurrent: {most}: pbt takes turns with all of its population by itself")
        trials = self.budget.trials
        require(trials is not None and trials >= 2, f"budget.trials: {trials}: pbt needs a population of 2 or more")
        for key in self.space:
            can_change = key.startswith(_MUTABLE) and key not in _FIXED
            require(
                can_change,
                f"space.{key}: pbt cannot change it under weights that stay; it can change what is below "
                f"{', '.join(prefix.rstrip('.') for prefix in _MUTABLE)}, except {' and '.join(_FIXED)}",
            )


def load_search(file: str) -> SearchConfig:
    """Read a specification.

    Args:
        file: A YAML file, or the name of one in `jobs/searches/`.

    Raises:
        ConfigError: It cannot be read, or a key or value is refused.
    """
    return parse(SearchConfig, read_specification(file, folder=SEARCHES, what="search"))


def base_of(spec: SearchConfig, *, manifest: str, out: str, overrides: Iterable[str] = ()) -> ExperimentConfig:
    """Resolve what every trial starts from, with absolute paths; it evaluates after every epoch.

    Raises:
        ConfigError: A key or value is refused, or contradicts the specification.
    """
    own = [
        f"name={spec.name}-default",
        f"output={out}",
        f"data.manifest={manifest}",
        f"train.workers={spec.trial.workers}",
        f"train.use_gpu={str(spec.trial.gpus > 0).lower()}",
        "tracking.registered_model=null",
    ]
    base = load(spec.base, ["train.evaluate_every=1", *spec.set, *overrides, *own]).located()
    if spec.final.seeds and base.train.seed in spec.final.seeds:
        raise ConfigError(
            f"final.seeds: {list(spec.final.seeds)} holds train.seed={base.train.seed}, which the search uses; the "
            "comparison needs others"
        )
    grace, epochs = spec.scheduler.grace_epochs, base.train.num_epochs
    if spec.scheduler.kind in ("asha", "median") and grace > epochs:
        raise ConfigError(f"scheduler.grace_epochs: {grace} is more than train.num_epochs={epochs}")
    return base


def space_of(spec: SearchConfig, base: ExperimentConfig) -> Space:
    """Check the space over the base.

    Raises:
        ConfigError: See `Space`; or a grid lacks the number of a range's values.
    """
    space = Space(spec.space, base)
    if spec.searcher.kind == "grid":
        space.grid()
    return space
