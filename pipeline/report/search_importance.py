"""How much each parameter of a search mattered, and what shuffled numbers would have shown by luck.

The measure is fANOVA's main effect (Hutter, Hoos and Leyton-Brown, ICML 2014): the share of the metric's variance over
the whole search space that a parameter explains alone, by a forest of regression trees. A forest finds a share for
everything; so the metrics are shuffled among the trials and the same is computed again, several times.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from pipeline.report.contents import FloatArray
from pipeline.report.search_axes import Axis, axis_of
from pipeline.report.search_words import count
from pipeline.search import SearchResult, SearchTrial

NUM_SHUFFLES = 19  # a parameter without influence exceeds all of them once in 20
MIN_TRIALS = 5  # fewer have too few orders for a shuffle to tell anything
_NUM_TREES = 32


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What one parameter explains.

    Attributes:
        name: Its dotted key.
        share: Of the metric's variance, from 0 to 1.
        by_luck: The largest share that it had among shuffled metrics.
        num_trials: Number of trials that have it.
    """

    name: str
    share: float
    by_luck: float
    num_trials: int

    @property
    def stands_out(self) -> bool:
        """Whether luck alone reaches it in less than one of twenty searches."""
        return self.share > self.by_luck


@dataclass(frozen=True, kw_only=True)
class Importances:
    """What all parameters explain.

    Attributes:
        found: The largest share first.
        missing: What cannot be computed, and why, by the parameter's name.
        epoch: Trials are compared by the best of their evaluations until this epoch, the last that all have; None if
            nothing could be compared.
        num_trials: Number of trials that are compared.
        left_out: Number of trials that are not, by reason.
    """

    found: tuple[Importance, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    epoch: int | None = None
    num_trials: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)


def importances_of(result: SearchResult) -> Importances:
    """Measure every parameter on the trials that have it, at an epoch that all of them reached."""
    metrics, epoch, left_out = _compared(result)
    trials = [trial for trial in result.trials if trial.name in metrics]
    groups: dict[tuple[str, ...], list[str]] = {}
    for parameter in result.parameters:
        having = tuple(trial.name for trial in trials if parameter.name in trial.values)
        groups.setdefault(having, []).append(parameter.name)
    # The default may lie outside of the space that was searched.
    axes = {one.name: axis_of(replace(one, default=None), trials) for one in result.parameters}
    found: list[Importance] = []
    missing: dict[str, str] = {}
    for names, wanted in groups.items():  # parameters under one condition share a forest
        members = [trial for trial in trials if trial.name in names]
        for name in wanted:
            if reason := _why_not(members, axes[name], metrics):
                missing[name] = reason
        if able := [name for name in wanted if name not in missing]:
            found += _measure(members, able, axes=axes, metrics=metrics)
    found.sort(key=lambda importance: -importance.share)
    return Importances(found=tuple(found), missing=missing, epoch=epoch, num_trials=len(trials), left_out=left_out)


def _compared(result: SearchResult) -> tuple[dict[str, float], int | None, dict[str, int]]:
    """Return each trial's metric at the common epoch, that epoch, and the number of trials left out by reason."""
    left_out: Counter[str] = Counter()
    able: list[SearchTrial] = []
    for trial in result.trials:
        if trial.status in ("failed", "running"):
            left_out[trial.status] += 1
        elif not trial.evaluations:
            left_out["without an evaluation"] += 1
        else:
            able.append(trial)
    if not able:
        return {}, None, dict(left_out)
    epoch = min(int(trial.evaluations[-1]["epoch"]) for trial in able)
    metrics = {}
    for trial in able:
        values = [found[result.metric] for found in trial.evaluations if found["epoch"] <= epoch]
        if values:
            metrics[trial.name] = max(values)
        else:
            left_out[f"without an evaluation until epoch {epoch}"] += 1
    return metrics, epoch, dict(left_out)


def _why_not(trials: Sequence[SearchTrial], axis: Axis, metrics: Mapping[str, float]) -> str:
    if len(trials) < MIN_TRIALS:
        return f"{count(len(trials), 'trial')} to compare, {MIN_TRIALS} are needed"
    places = {axis.place(trial.values[axis.name]) for trial in trials}
    if None in places:
        return "a value has no place on its axis"
    if len(places) == 1:
        return f"all {len(trials)} trials that have it have the same value"
    if len({metrics[trial.name] for trial in trials}) == 1:
        return f"all {len(trials)} trials that have it reached the same"
    return ""


def _measure(
    trials: Sequence[SearchTrial], wanted: Sequence[str], *, axes: Mapping[str, Axis], metrics: Mapping[str, float]
) -> list[Importance]:
    """Measure `wanted` beside every other parameter that all these trials have."""
    present = [
        axis
        for name, axis in axes.items()
        if all(name in trial.values and axis.place(trial.values[name]) is not None for trial in trials)
    ]
    values = np.array([metrics[trial.name] for trial in trials])
    random = np.random.default_rng(0)
    orders = [values, *(random.permutation(values) for _ in range(NUM_SHUFFLES))]
    real, *shuffled = _shares(trials, orders, axes=present)
    return [
        Importance(
            name=name,
            share=real[name],
            by_luck=max(shares[name] for shares in shuffled),
            num_trials=len(trials),
        )
        for name in wanted
    ]


def _shares(
    trials: Sequence[SearchTrial], orders: Sequence[FloatArray], *, axes: Sequence[Axis]
) -> list[dict[str, float]]:
    """Return the main effect of each axis for each way to give the trials a metric."""
    points = {axis.name: _coordinate(axis) for axis in axes}
    distributions = {axis.name: _distribution(axis) for axis in axes}
    with _quiet_optuna():
        study = optuna.create_study(direction="maximize")
    study.add_trials(
        optuna.trial.create_trial(
            params={name: point(trial) for name, point in points.items()}, distributions=distributions, value=0.0
        )
        for trial in trials
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=_NUM_TREES, seed=0)

    def shares(values: FloatArray) -> dict[str, float]:
        with warnings.catch_warnings():  # of the argument `normalize`, without which shares would always add up to one
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            found = optuna.importance.get_param_importances(
                study, evaluator=evaluator, target=lambda trial: float(values[trial.number]), normalize=False
            )
        return {name: float(share) for name, share in found.items()}

    return [shares(values) for values in orders]


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Keep optuna from telling that it made a study in memory."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _coordinate(axis: Axis) -> Callable[[SearchTrial], float | str]:
    """Return what a trial's value is for the forest: a place on the axis as it was searched, or a category."""
    # optuna's fANOVA weighs a logarithmic range as a linear one, of which the small values are nearly nothing.
    if axis.categories:
        return lambda trial: f"{axis.place(trial.values[axis.name]):.6f}"
    return lambda trial: axis.place(trial.values[axis.name]) or 0.0


def _distribution(axis: Axis) -> BaseDistribution:
    if axis.categories:
        return CategoricalDistribution([f"{tick.place:.6f}" for tick in axis.ticks])
    return FloatDistribution(0.0, 1.0)
