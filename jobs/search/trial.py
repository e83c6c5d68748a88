"""What one trial of a search does, in its own Ray actor: it trains in its folder and tells Tune after each evaluation.

A trial that is started again goes on from its own newest checkpoint, and first tells again what that checkpoint
remembers, so that what Tune was never told is not lost. Tune hears of an evaluation only once its checkpoint is
durable.

In population-based training a trial that takes over another's weights goes on in a new folder, `generation-2`, which
begins with a copy of the other's checkpoint: a run's folder holds one configuration.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune

from cvft.checkpoint import read_info
from cvft.configuration import parse
from cvft.errors import CheckpointError, CvftError, StoreUnavailableError
from jobs import pictures, run_file, tracked
from jobs.config import ExperimentConfig
from jobs.entry import log_to_stderr
from jobs.search.journal import TRIALS, trial_name
from jobs.search.space import with_values
from jobs.training import attempts, worker
from jobs.training.progress import Metrics, read_history
from jobs.training.ray_train import train_on_ray
from jobs.training.saving import checkpoints_of, newest_of
from pipeline.cache import default_cache
from pipeline.checkpoints import checkpoint_name, fetch
from pipeline.manifest import Manifest
from pipeline.patience import patiently
from pipeline.storage import Store
from pipeline.tracking.runs import Run

FAILURE_FILE = "failure.json"  # of an error that trying again does not mend
_CHECKPOINT = "checkpoint"  # in a Tune checkpoint


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """What all trials of a search have in common, as plain data that travels to their actors.

    Attributes:
        base: The configuration that every trial starts from.
        out: URI of the search's folder.
        run: The search's run in MLflow, to which those of the trials belong.
        threads: Threads that torch computes with on the CPU.
        is_population: Whether trials hand their checkpoints to others.
    """

    base: Mapping[str, Any]
    out: str
    run: Mapping[str, Any]
    threads: int = 1
    is_population: bool = False


def trial_config(
    base: Mapping[str, Any], out: str, *, number: int, generation: int, values: Mapping[str, Any]
) -> ExperimentConfig:
    """Return what a trial trains; the first generation is in the trial's folder, others are below it.

    Raises:
        ConfigError: The values cannot be used together.
    """
    trials = Store.from_uri(out).uri(TRIALS)
    name = trial_name(number)
    place = {"output": trials, "name": name}
    if generation > 1:
        place = {"output": f"{trials}/{name}", "name": f"generation-{generation}"}
    return parse(ExperimentConfig, {**with_values(base, values), **place})


def run_trial(settings: TrialSettings, trial: Mapping[str, Any]) -> None:
    """Train a trial, or go on with it, and report to Tune; a user's error is left in the trial's folder.

    Args:
        settings: The search's.
        trial: `number`, `generation`, `values`, and for a generation that takes over weights `origin`.

    Raises:
        StoreUnavailableError: A store was away for too long; trying again may help.
        TakenOverError: The trial goes on elsewhere.
    """
    log_to_stderr()
    for name in ("cvft", "pipeline", "ray"):  # the driver tells of trials; the lines of many would be a jumble
        logging.getLogger(name).setLevel(logging.WARNING)
    # A trial that Tune ends is cut off while it tells MLflow; the driver tells the rest, and what is then left.
    logging.getLogger("pipeline.tracking.outbox").setLevel(logging.ERROR)
    place = {"number": trial["number"], "generation": trial["generation"], "values": trial["values"]}
    store = Store.from_uri(Store.from_uri(settings.out).uri(f"{TRIALS}/{trial_name(trial['number'])}"))
    store.delete(FAILURE_FILE)
    try:
        _Trial(settings, trial_config(settings.base, settings.out, **place), trial).run()
    except (attempts.TakenOverError, StoreUnavailableError):
        raise
    except CvftError as error:
        store.write_bytes(FAILURE_FILE, json.dumps({"reason": " ".join(str(error).split())}).encode())


def read_failure(folder: str) -> str | None:
    """Return why a trial ended for good, or none if it did not.

    Raises:
        StoreError: The folder cannot be read.
    """
    store = Store.from_uri(folder)
    return str(json.loads(store.read_bytes(FAILURE_FILE))["reason"]) if store.exists(FAILURE_FILE) else None


def read_run(folder: str) -> Run | None:
    """Return the MLflow run that a trial's folder names, or none.

    Raises:
        StoreError: The folder cannot be read.
    """
    store = Store.from_uri(folder)
    content = json.loads(store.read_bytes(run_file.RUN_FILE)) if store.exists(run_file.RUN_FILE) else {}
    return Run(**content["run"]) if content.get("run") else None


class _Trial:
    def __init__(self, settings: TrialSettings, config: ExperimentConfig, trial: Mapping[str, Any]) -> None:
        self._settings = settings
        self._config = config
        self._trial = trial

    def run(self) -> None:
        """Train to the end."""
        if self._trial.get("origin") and not checkpoints_of(self._config).names():
            self._take_over()
        manifest = Manifest.load(self._config.data.manifest)
        run = patiently(lambda: self._open_run(manifest), patience_s=self._config.train.store_patience_s)
        self._tell_again()
        if self._config.train.max_workers > 1:
            train_on_ray(self._config, run, is_trial=True)
        else:
            self._train_here(run)

    def _train_here(self, run: Run) -> None:
        device = torch.device("cuda" if self._config.train.use_gpu else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(self._settings.threads)
        store = Store.from_uri(self._config.folder)
        guard = attempts.claim(store, attempts.begin_attempt(store)).check
        last: list[Metrics] = []  # Tune ends a trial when it hears of its last epoch: MLflow hears of it first
        with tracked.Recorder(self._config, run, device) as record:

            def on_epoch(metrics: Metrics) -> None:
                record.on_epoch(metrics)
                if metrics["epoch"] < self._config.train.num_epochs:
                    self._report(metrics)
                else:
                    last.append(metrics)

            hooks = {**record.hooks, "on_epoch": on_epoch}

            worker.train(self._config, device=device, guard=guard, is_durable=True, **hooks)
        pictures.log_pictures(self._config, run, device=device)
        for metrics in last:
            self._report(metrics)

    def _open_run(self, manifest: Manifest) -> Run:
        """Open the trial's run in MLflow; all generations are one run."""
        content, is_continued = run_file.enter(self._config, manifest, remedy="choose another --out")
        known = Run(**content["run"]) if content.get("run") else None
        if self._trial["generation"] > 1 and known is None:
            known, is_continued = read_run(self._config.output), True
        parent = Run(**self._settings.run)
        run = tracked.open_run(self._config, manifest, known=known, is_continued=is_continued, parent=parent)
        if asdict(run) != content.get("run"):
            run_file.write(Store.from_uri(self._config.folder), {**content, "run": asdict(run)})
        return run

    def _tell_again(self) -> None:
        """Report the evaluations that the newest checkpoint remembers, of a member of a population the last one."""
        found = newest_of(self._config)
        if found is None:
            return
        first = self._trial["origin"]["epoch"] if self._trial.get("origin") else 0
        own = [metrics for metrics in read_history(read_info(found[1])) if metrics["epoch"] > first]
        for metrics in own[-1:] if self._settings.is_population else own:
            self._report(metrics)

    def _report(self, metrics: Mapping[str, float]) -> None:
        """Tell Tune, which may end this process here."""
        if not self._settings.is_population:
            tune.report(dict(metrics))
            return
        with tempfile.TemporaryDirectory() as folder:
            uri = checkpoints_of(self._config).uri(checkpoint_name(int(metrics["step"])))
            shutil.copytree(fetch(uri, cache=default_cache().parent), Path(folder) / _CHECKPOINT)
            tune.report(dict(metrics), checkpoint=tune.Checkpoint.from_directory(folder))

    def _take_over(self) -> None:
        """Begin a generation with the donor's checkpoint, which Tune hands over."""
        checkpoint = tune.get_checkpoint()
        if checkpoint is None:
            raise CheckpointError(f"{self._config.folder}: there is no checkpoint of {self._trial['origin']['donor']}")
        with checkpoint.as_directory() as folder:
            source = Path(folder) / _CHECKPOINT
            name = checkpoint_name(read_info(source).step)
            checkpoints_of(self._config).copy_from(source, name)
