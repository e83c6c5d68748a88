"""The trials of a search on Ray Tune: each in its own actor, as many at a time as there is room for.

Tune schedules, but it is not where the truth is: every start makes a new Tuner from the journal. Trials that ended are
not given to it; their evaluations are told to the scheduler again, so that new trials are compared with them. Tune's
own snapshot, which `Tuner.restore` reads, is seconds older than what happened, is made of several files that a kill may
leave at odds, and is a pickle of the code that wrote it.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from cvft.configuration import to_plain
from cvft.errors import ClusterError
from jobs.room import can_add_nodes
from jobs.search.clock import Clock
from jobs.search.events import Events, Unpickled, close_runs
from jobs.search.journal import trial_name
from jobs.search.plan import Search
from jobs.search.scheduler import scheduler_of
from jobs.search.trial import TrialSettings, run_trial
from pipeline.storage import Store


def run_search(search: Search) -> None:
    """Do the trials that are missing, until all have ended or the budget is used up.

    Raises:
        TakenOverError: Another driver goes on with this search.
        ClusterError: The cluster cannot hold a trial, or Tune ended before the search did.
        CvftError: The space has nothing left to draw, or a store is away.
    """
    if search.has_work:
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the table is ours
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would end an interrupted search as one that is done
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that failed reports no recall
        os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # the reason is told in one line
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        events = Events(search)
        # An interrupted Tune leaves a thread behind that still copies its snapshot to this folder.
        with tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as local:
            _fit(search, events, local)
    close_runs(search)
    left = search.unfinished()
    if left and not search.clock.used_up:
        raise ClusterError(f"{trial_name(left[0])} and {len(left) - 1} more did not end; the same command goes on")


def _fit(search: Search, events: Events, local: str) -> None:
    trial, base = search.spec.trial, search.base
    settings = TrialSettings(
        base=to_plain(base),
        out=search.out.uri(),
        run=asdict(search.run),
        threads=trial.threads,
        is_population=search.is_population,
    )

    def train_trial(config: dict[str, Any]) -> None:
        run_trial(settings, config["trial"])

    can_grow = bool(os.environ.get("RAY_ADDRESS")) and can_add_nodes()
    most = _most_at_a_time(search, can_grow=can_grow)
    # Tune asks for one trial's room after the other, and with it for one node; here for all that the search may have.
    num_asked = trial.max_concurrent if can_grow else None
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(num_asked or "auto")
    search_alg = None
    space: dict[str, Any] = {}
    if search.is_population:  # all of it from the beginning
        members = [search.begin(number) for number in search.unfinished()]
        while search.num_left():
            members.append(search.begin(search.next_number()))
        space = {"trial": tune.grid_search(members)}
    else:
        search_alg = _Proposals(search, max_concurrent=most)
    filesystem, path = _tune_storage(search, local)
    tuner = tune.Tuner(
        tune.with_resources(train_trial, _resources(search)),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search_alg,
            scheduler=scheduler_of(search),
            num_samples=1 if search.is_population else -1,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            stop=_Budget(search.clock),
            failure_config=tune.FailureConfig(max_failures=trial.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4 if search.is_population else None),
            callbacks=[events],
            verbose=0,
        ),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consider boosting PBT")  # a trial's process is its own
        tuner.fit()
    events.finish()


def _tune_storage(search: Search, local: str) -> tuple[Any, str]:
    """Return where Tune keeps what a session needs: nothing of it is read by another."""
    if not search.is_population:
        return None, local
    if search.out.list("tune"):
        search.out.delete_folder("tune")
    return Store.from_uri(search.out.uri("tune")).arrow


def _name_of(trial: Any) -> str:
    return trial_name(trial.config["trial"]["number"])


def _resources(search: Search) -> Any:
    trial = search.spec.trial
    if trial.workers > 1:  # its workers take what they need; the trial itself waits for them
        return tune.PlacementGroupFactory([{"memory": 1}])
    return {"cpu": trial.cpus, "gpu": trial.gpus}


def _most_at_a_time(search: Search, *, can_grow: bool) -> int | None:
    """Return how many trials may train at a time: of several workers as many as find room together, or will.

    Raises:
        ClusterError: There is no room for one, in a cluster that will not grow.
    """
    trial = search.spec.trial
    there = ray.cluster_resources()
    each = {"CPU": float(trial.cpus), "GPU": trial.gpus}
    room = min(int(there.get(name, 0) // (number * trial.workers)) for name, number in each.items() if number)
    if room == 0 and not os.environ.get("RAY_ADDRESS"):
        wanted = f"{trial.workers} x {trial.cpus} CPUs" + (f" and {trial.gpus:g} GPUs" if trial.gpus else "")
        has = f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs"
        raise ClusterError(f"trial: a trial wants {wanted}, this machine has {has}")
    if trial.max_concurrent and (can_grow or trial.workers == 1):
        return trial.max_concurrent
    room = max(1, room)
    return min(trial.max_concurrent or room, room) if trial.workers > 1 else None


class _Proposals(Unpickled, Searcher):  # type: ignore[misc]  # Ray has no types
    """Gives Tune the trials that are to be done: first those that had begun, then new ones."""

    def __init__(self, search: Search, *, max_concurrent: int | None) -> None:
        super().__init__(metric=search.spec.metric, mode="max")
        self._search = search
        self._most = max_concurrent
        self._waiting = search.unfinished()
        self._live: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """Return what a trial's actor is told; None while no more may train at a time."""
        if self._most is not None and len(self._live) >= self._most:
            return None
        if not self._waiting and self._search.num_left() == 0:
            return Searcher.FINISHED
        number = self._waiting.pop(0) if self._waiting else self._search.next_number()
        self._live.add(trial_id)
        return {"trial": self._search.begin(number)}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Make room for another one."""
        self._live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing is kept here."""


class _Budget(Unpickled, Stopper):  # type: ignore[misc]  # Ray has no types
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._clock.used_up)
