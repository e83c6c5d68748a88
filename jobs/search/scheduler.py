"""Who is stopped early: Tune's schedulers, told first of the trials that ended before this start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from jobs.entry import LOGGER
from jobs.search.config import SchedulerConfig
from jobs.search.journal import Generation, TrialRecord
from jobs.search.plan import Search, told
from jobs.search.space import explore

_TIME = "epoch"


class _Once:
    """Hears of each epoch of a trial once: one that is started again tells all of them again."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        seen: dict[str, int] = self.__dict__.setdefault("_seen", {})
        epoch = result.get(_TIME)
        if epoch is None or epoch <= seen.get(trial.trial_id, 0):
            return str(TrialScheduler.CONTINUE)
        seen[trial.trial_id] = epoch
        return str(super().on_trial_result(tune_controller, trial, result))  # type: ignore[misc]


class _Asha(_Once, AsyncHyperBandScheduler):  # type: ignore[misc]  # Ray has no types
    def tell(self, records: Iterable[TrialRecord]) -> None:
        for record in records:
            ended = _Ended(record)
            self.on_trial_add(None, ended)
            for metrics in record.evaluations:
                self.on_trial_result(None, ended, metrics)


class _Median(_Once, MedianStoppingRule):  # type: ignore[misc]  # Ray has no types
    def tell(self, records: Iterable[TrialRecord]) -> None:
        for record in records:
            ended = _Ended(record)
            for metrics in (*record.evaluations, *record.evaluations[-1:]):  # Tune tells the last one at the end again
                self.on_trial_complete(None, ended, metrics)


class _Ended:
    """A trial that ended before this start, as far as a scheduler looks at it."""

    def __init__(self, record: TrialRecord) -> None:
        self.trial_id = record.name


def rungs(config: SchedulerConfig, num_epochs: int) -> tuple[int, ...]:
    """Return the epochs after which the scheduler compares trials."""
    if config.kind == "pbt":
        return tuple(range(config.perturb_every, num_epochs, config.perturb_every))
    if config.kind != "asha":
        return ()
    num_rungs = int(np.log(num_epochs / config.grace_epochs) / np.log(config.reduction_factor) + 1)
    found = (int(np.ceil(config.grace_epochs * config.reduction_factor**k - 1e-9)) for k in range(num_rungs))
    return tuple(epoch for epoch in found if epoch < num_epochs)


class _Population(PopulationBasedTraining):  # type: ignore[misc]  # Ray has no types
    """Tune's population-based training with our own mutation, and with each take-over on record before it happens."""

    def __init__(self, search: Search) -> None:
        config = search.spec.scheduler
        super().__init__(
            time_attr=_TIME,
            metric=search.spec.metric,
            mode="max",
            perturbation_interval=config.perturb_every,
            quantile_fraction=config.quantile,
            resample_probability=config.resample,
            custom_explore_fn=dict,  # Tune asks for one; `_get_new_config` explores
            log_config=False,
            synch=config.is_synchronous,
        )
        self._search = search
        records = search.journal.records
        behind = min((self._last_perturbed(records[number].epoch) for number in search.unfinished()), default=0)
        self._next_perturbation_sync = behind + config.perturb_every

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        self._trial_state[trial].last_perturbation_time = self._last_perturbed(self._record(trial).epoch)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        if result[_TIME] >= self._search.base.train.num_epochs:
            return str(TrialScheduler.CONTINUE)  # at its end: what it takes over could not be trained any more
        return str(super().on_trial_result(tune_controller, trial, result))

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what the trial goes on with: the donor's values a little changed, from the donor's checkpoint."""
        record, donor = self._record(trial), self._record(trial_to_clone)
        checkpoint = self._trial_state[trial_to_clone].last_result
        spec, generation = self._search.spec, len(record.generations) + 1
        generator = np.random.default_rng([spec.searcher.seed, record.number, generation])
        values = explore(self._search.space, donor.values, generator, resample=spec.scheduler.resample)
        taken = Generation(
            values=values,
            donor=donor.name,
            donor_generation=len(donor.generations),
            epoch=int(checkpoint["epoch"]),
            step=int(checkpoint["step"]),
        )
        self._search.journal.put(replace(record, generations=(*record.generations, taken)))
        LOGGER.info("%s takes over %s as it was after epoch %d", record.name, donor.name, taken.epoch)
        return {"trial": told(record.number, generation, taken)}, {}

    def _last_perturbed(self, epoch: int) -> int:
        return epoch - epoch % self._search.spec.scheduler.perturb_every

    def _record(self, trial: Any) -> TrialRecord:
        return self._search.journal.records[trial.config["trial"]["number"]]


def scheduler_of(search: Search) -> Any:
    """Return the scheduler of a search, which knows of the trials that ended before."""
    config, num_epochs = search.spec.scheduler, search.base.train.num_epochs
    if config.kind == "pbt":
        return _Population(search)
    if config.kind == "none":
        return FIFOScheduler()
    metric, grace = search.spec.metric, config.grace_epochs
    known: dict[str, Any] = {"time_attr": _TIME, "metric": metric, "mode": "max", "grace_period": grace}
    scheduler: _Asha | _Median
    if config.kind == "asha":
        scheduler = _Asha(max_t=num_epochs, reduction_factor=config.reduction_factor, **known)
    else:
        # Never paused to let others come as far: a pause is a new process for a trial.
        scheduler = _Median(min_samples_required=config.min_samples, min_time_slice=float("inf"), **known)
    scheduler.tell(record for record in search.journal.in_order() if record.status in ("finished", "stopped"))
    return scheduler
