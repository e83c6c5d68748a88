"""Which values a trial gets: a function of the searcher's seed, the trial's number and, for Optuna, the trials so far.

No searcher keeps a state. Optuna's study is made anew from the trials on record for each proposal, so that a search
that was killed proposes what it would have proposed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import optuna

from cvft.errors import ConfigError
from jobs.search.config import SearchConfig
from jobs.search.journal import TrialRecord
from jobs.search.parameter import ParameterConfig
from jobs.search.space import Space, Values
from pipeline.search import Value

_TRIES = 100


class Searcher(Protocol):
    """Proposes the values of trials.

    Attributes:
        num_trials: The most trials that there are; none is any number.
        num_left_out: Combinations of a grid that the configuration refuses.
    """

    num_trials: int | None
    num_left_out: int

    def propose(self, number: int, records: Iterable[TrialRecord]) -> Values:
        """Return the values of trial `number`, which the configuration takes.

        Args:
            number: From 0 on.
            records: Trials so far.

        Raises:
            ConfigError: None of many combinations can be used.
        """
        ...


def searcher_of(spec: SearchConfig, space: Space) -> Searcher:
    """Return the searcher of a specification."""
    kind, seed = spec.searcher.kind, spec.searcher.seed
    if kind == "grid":
        return Grid(space, limit=spec.budget.trials)
    if kind == "optuna":
        return Optuna(
            space, seed=seed, num_random=spec.searcher.num_random, metric=spec.metric, limit=spec.budget.trials
        )
    return Random(space, seed=seed, limit=spec.budget.trials)


class Random:
    """Draws each value for itself."""

    def __init__(self, space: Space, *, seed: int, limit: int | None) -> None:
        self._space = space
        self._seed = seed
        self.num_trials = limit
        self.num_left_out = 0

    def propose(self, number: int, records: Iterable[TrialRecord]) -> Values:
        """See `Searcher`; the trials so far do not matter."""
        for attempt in range(_TRIES):
            values = self._space.draw(np.random.default_rng([self._seed, number, attempt]))
            if self._space.allows(values):
                return values
        raise _none_fits(number)


class Grid:
    """Takes every combination once.

    Attributes:
        num_trials: Combinations that the configuration takes, or as many of them as the budget allows.
        num_left_out: Combinations that it refuses.
    """

    def __init__(self, space: Space, *, limit: int | None) -> None:
        points = space.grid()
        self._points = [values for values in points if space.allows(values)]
        self.num_left_out = len(points) - len(self._points)
        self.num_trials: int | None = len(self._points) if limit is None else min(limit, len(self._points))

    def propose(self, number: int, records: Iterable[TrialRecord]) -> Values:
        """See `Searcher`."""
        return self._points[number]


class Optuna:
    """Optuna's tree-structured Parzen estimator over the trials so far."""

    def __init__(self, space: Space, *, seed: int, num_random: int, metric: str, limit: int | None) -> None:
        self._space = space
        self._seed = seed
        self._num_random = num_random
        self._metric = metric
        self.num_trials = limit
        self.num_left_out = 0
        self._distributions = {key: _distribution(parameter) for key, parameter in space.parameters.items()}

    def propose(self, number: int, records: Iterable[TrialRecord]) -> Values:
        """See `Searcher`; trials under way count as bad ones, so that trials at the same time differ."""
        known = [self._frozen(record) for record in records if record.number != number]
        for attempt in range(_TRIES):
            values = self._ask(
                known, seed=int(np.random.SeedSequence([self._seed, number, attempt]).generate_state(1)[0])
            )
            if self._space.allows(values):
                return values
        raise _none_fits(number)

    def _ask(self, known: list[optuna.trial.FrozenTrial], *, seed: int) -> Values:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # constant_liar
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=self._num_random, constant_liar=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(known)
        trial = study.ask()
        values: Values = {}
        for key, parameter in self._space.parameters.items():
            if self._space.is_active(key, values):
                values[key] = _suggest(trial, key, parameter)
        return values

    def _frozen(self, record: TrialRecord) -> optuna.trial.FrozenTrial:
        """Return a trial as Optuna keeps it: one that was stopped early counts by how far it came, and how well."""
        states = optuna.trial.TrialState
        state = {
            "finished": states.COMPLETE,
            "stopped": states.PRUNED,
            "failed": states.FAIL,
            "running": states.RUNNING,
        }
        values = record.values
        best = record.best(self._metric)
        return optuna.trial.create_trial(
            state=state[record.status] if best is not None or record.status in ("failed", "running") else states.FAIL,
            params=dict(values),
            distributions={key: self._distributions[key] for key in values},
            value=best if record.status == "finished" else None,
            intermediate_values={int(numbers["epoch"]): numbers[self._metric] for numbers in record.evaluations},
        )


def _suggest(trial: optuna.Trial, key: str, parameter: ParameterConfig) -> Value:
    if parameter.type == "choice":
        choice: Value = trial.suggest_categorical(key, parameter.values)
        return choice
    distribution = _distribution(parameter)
    low, high, step, log = distribution.low, distribution.high, distribution.step, distribution.log
    if parameter.type == "int":
        return int(trial.suggest_int(key, low, high, step=step, log=log))
    return parameter.cast(float(trial.suggest_float(key, low, high, step=step, log=log)))


def _distribution(parameter: ParameterConfig) -> Any:
    if parameter.type == "choice":
        return optuna.distributions.CategoricalDistribution(parameter.values)
    low, high = parameter.range
    if parameter.step is not None:
        high = low + parameter.step * int((high - low) / parameter.step + 1e-9)  # Optuna warns where it is no multiple
    if parameter.type == "int":
        return optuna.distributions.IntDistribution(
            int(low), int(high), log=parameter.log, step=int(parameter.step or 1)
        )
    return optuna.distributions.FloatDistribution(low, high, log=parameter.log, step=parameter.step)


def _none_fits(number: int) -> ConfigError:
    return ConfigError(
        f"space: of {_TRIES} combinations drawn for trial {number} the configuration takes none; narrow the space, or "
        "say by `when` which values go together"
    )
