"""A training in MLflow: its run is opened, told of steps and evaluations, and closed, whether MLflow is there or not.

All goes through `pipeline.tracking.outbox`. A server of MLflow need not even be there when a training begins; a file
must be.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from cvft.configuration import to_plain
from cvft.engine import StepReport
from cvft.errors import StoreError, StoreUnavailableError
from jobs.commit import code_commit
from jobs.config import ExperimentConfig
from jobs.entry import LOGGER
from jobs.metrics import TrainingMetrics
from jobs.resources import Machine, memory_metrics
from jobs.training.saving import checkpoints_of
from pipeline.cache import default_cache
from pipeline.checkpoints import checkpoint_name
from pipeline.manifest import Manifest
from pipeline.storage import Store
from pipeline.tracking.environment import environment_text
from pipeline.tracking.external import EVALUATION, record_checkpoints
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.runs import COMMIT_TAG, Run, Status, create_run, find_run, get_run
from pipeline.tracking.server import prepare, resolve, store_errors

ENVIRONMENT_FILE = "environment.txt"
RECORDER_CLOSE_S = 5.0  # `finish_run` waits longer; a node that is about to go must not


def open_run(
    config: ExperimentConfig, manifest: Manifest, *, known: Run | None, is_continued: bool, parent: Run | None = None
) -> Run:
    """Open the MLflow run of a training, and tell it what is trained on what.

    Args:
        config: The experiment.
        manifest: Its data.
        known: The run that the training's folder names, if it names one.
        is_continued: Whether the folder holds a training of this configuration; else the run is a new one.
        parent: The run that a new one is shown below, such as that of a search; one that goes on keeps its own.

    Raises:
        StoreUnavailableError: MLflow does not answer, is no server, and no run is known that could be told later.
        StoreError: MLflow or the folder cannot be used.
    """
    try:
        run = _find_or_create(config, known=known, is_continued=is_continued, parent=parent)
    except StoreUnavailableError as error:
        later = _run_for_later(config, known=known if is_continued else None, parent=parent)
        if later is None:
            raise
        run = later
        LOGGER.warning("%s. %s goes on all the same and tells it later", error, config.name)
    commit = code_commit()
    with outbox_of(config, run) as outbox:
        outbox.defer(Run.resume)
        outbox.defer(Run.log_config, config=to_plain(config))
        tags = {"manifest_digest": manifest.digest, **({COMMIT_TAG: commit} if commit else {})}
        outbox.defer(Run.set_tags, tags=tags)
        for context, split in (("training", config.data.train_split), (EVALUATION, config.data.eval_split)):
            outbox.defer(
                Run.log_dataset,
                name=f"{manifest.layout} {split}",
                digest=manifest.digest,
                source=manifest.uri,
                context=context,
                profile={"split": split, "pairs": manifest.splits[split]},
            )
        outbox.defer(Run.log_text, text=environment_text(commit=commit), artifact_file=ENVIRONMENT_FILE)
    return run


def finish_run(
    config: ExperimentConfig,
    run: Run,
    status: Status,
    *,
    evaluations: Sequence[Mapping[str, float]] = (),
    tags: Mapping[str, str] | None = None,
) -> str:
    """Close the MLflow run of a training; where that cannot even be kept for later, say so.

    Args:
        config: The experiment.
        run: Its run.
        status: How it ended.
        evaluations: All of them: a process that died between a checkpoint and its record left one out.
        tags: Set too.

    Returns:
        The run's id; empty if MLflow has been away all the time.
    """
    try:
        with outbox_of(config, run) as outbox:
            if tags:
                outbox.defer(Run.set_tags, tags=dict(tags))
            if evaluations:
                outbox.defer(record_checkpoints, **_records(config, evaluations, kept=checkpoints_of(config).names()))
            outbox.defer(Run.finish, status=status, end_time_ms=int(time.time() * 1000))
    except StoreError as error:  # how the training ended matters more
        LOGGER.warning("the run in MLflow stays open: %s", error)
        return run.run_id
    return outbox.run.run_id


def deliver(config: ExperimentConfig, run: Run) -> int:
    """Send what still waits for MLflow in a training's folder, if MLflow answers.

    Returns:
        Number of entries that go on waiting.

    Raises:
        StoreError: The folder cannot be read or written.
    """
    return outbox_of(config, run).close()


class Recorder:
    """Tells MLflow of a training under way; rank 0 alone makes one."""

    def __init__(self, config: ExperimentConfig, run: Run, device: torch.device) -> None:
        """Begin to send what an earlier process left, and then what comes.

        Raises:
            StoreError: The training's folder cannot be read or written.
        """
        self._config = config
        self._outbox = outbox_of(config, run)
        self._evaluating = threading.Lock()
        self._evaluated: set[int] = set()
        self._metrics = TrainingMetrics(config.name)
        self._steps = StepMetrics(self._log, every=config.tracking.log_every_steps, device=device)

    @property
    def hooks(self) -> dict[str, Any]:
        """The arguments of `jobs.training.worker.train` that tell of it."""
        return {"on_step": self.on_step, "on_epoch": self.on_epoch, "on_saved": self.on_saved}

    def on_step(self, report: StepReport) -> None:
        """Take the numbers of a step."""
        self._steps.add(report)
        self._metrics.add_step(report.pairs_per_s * (report.data_wait_s + report.step_s))

    def on_epoch(self, metrics: Mapping[str, float]) -> None:
        """Take the numbers of an evaluation."""
        self._log_evaluation(metrics)

    def on_saved(self, document: Mapping[str, Any], kept: Sequence[str]) -> None:
        """Take what a checkpoint that is durable says about itself, and the names of those that are there."""
        evaluations = [document["metrics"]] if document["metrics"] else []
        for metrics in evaluations:
            self._log_evaluation(metrics)
        self._outbox.defer(record_checkpoints, **_records(self._config, evaluations, kept=kept))

    def _log_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Log an evaluation before its checkpoint is recorded: a small one may be written before the training tells."""
        step = int(metrics["step"])
        with self._evaluating:
            if step not in self._evaluated:
                self._evaluated.add(step)
                self._log(metrics, step=step)

    def _log(self, numbers: Mapping[str, float], *, step: int) -> None:
        self._outbox.log_metrics(numbers, step=step)
        self._metrics.show(numbers, step=step)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._steps.flush()
        self._metrics.close()
        self._outbox.close(wait_s=RECORDER_CLOSE_S)


class StepMetrics:
    """Numbers of the steps of an interval, as one entry of MLflow."""

    def __init__(self, log: Callable[..., None], *, every: int, device: torch.device) -> None:
        """Log by `log(metrics, step=)` after each step whose number is a multiple of `every`."""
        self._log = log
        self._every = every
        self._device = device
        self._machine = Machine(device)
        self._reports: list[StepReport] = []

    def add(self, report: StepReport) -> None:
        """Take the numbers of a step; the interval's last one logs them."""
        self._reports.append(report)
        if (report.step + 1) % self._every == 0:
            self.flush()

    def flush(self) -> None:
        """Log the interval so far, under the number of steps done."""
        if self._reports:
            resources = {**memory_metrics(self._device), **self._machine.metrics()}
            self._log({**_means(self._reports), **resources}, step=self._reports[-1].step + 1)
            self._reports.clear()


def _means(reports: list[StepReport]) -> dict[str, float]:
    seconds = [report.data_wait_s + report.step_s for report in reports]
    num_pairs = sum(report.pairs_per_s * time_s for report, time_s in zip(reports, seconds, strict=True))
    return {
        "train/loss": sum(report.loss for report in reports) / len(reports),
        "train/gradient_norm": sum(report.gradient_norm for report in reports) / len(reports),
        "train/learning_rate": reports[-1].learning_rate,
        "train/pairs_per_s": num_pairs / sum(seconds),
        "train/data_wait_share": sum(report.data_wait_s for report in reports) / sum(seconds),
        "train/step_s": sum(report.step_s for report in reports) / len(reports),
    }


def _records(
    config: ExperimentConfig, evaluations: Iterable[Mapping[str, float]], *, kept: Sequence[str]
) -> dict[str, Any]:
    """Return the arguments of `record_checkpoints` for evaluations and what is there now."""
    folder = checkpoints_of(config)
    checkpoints = []
    for metrics in evaluations:
        step = int(metrics["step"])
        recalls = {name: value for name, value in metrics.items() if name.startswith("recall_at_")}
        name = checkpoint_name(step)
        checkpoints.append({"name": name, "uri": folder.uri(name), "step": step, "metrics": recalls})
    return {"model": config.name, "checkpoints": checkpoints, "kept": list(kept)}


def outbox_of(config: ExperimentConfig, run: Run) -> Outbox:
    """Return a new outbox of a training's run."""
    return Outbox(run, config.folder, cache=default_cache().parent)


def _find_or_create(config: ExperimentConfig, *, known: Run | None, is_continued: bool, parent: Run | None) -> Run:
    tracking = prepare(config.tracking.uri, experiment=config.tracking.experiment)
    identity = Store.from_uri(config.folder).uri()
    with store_errors(tracking.uri):
        run = None
        if is_continued:
            if known is not None and not known.run_id:
                return replace(known, uri=tracking.uri)
            run = get_run(tracking, known.run_id) if known is not None else None
            run = run or find_run(tracking, identity=identity)
        return run or create_run(tracking, name=config.name, identity=identity, parent=parent)


def _run_for_later(config: ExperimentConfig, *, known: Run | None, parent: Run | None) -> Run | None:
    """Return the run to tell later, when MLflow answers; none where nothing says that it ever will."""
    uri, _ = resolve(config.tracking.uri)
    if known is not None and known.uri == uri:
        return known
    if not uri.startswith(("http://", "https://")):
        return None
    if known is not None and not known.run_id:  # begun with another address, where nobody answered
        return replace(known, uri=uri)
    return Run(
        uri=uri,
        experiment=config.tracking.experiment,
        name=config.name,
        identity=f"{Store.from_uri(config.folder).uri()} {uuid.uuid4().hex}",
        parent_id=parent.run_id if parent else "",
    )
