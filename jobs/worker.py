"""What one training process does: the same in this process, under Ray Train, on one node or many.

Every rank runs `train`; rank 0 alone writes checkpoints and metrics. A worker that starts looks for the newest
checkpoint of the run's folder and goes on from there, so that a restart is nothing special.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from cvft.augment import Augment
from cvft.batch import prefetch
from cvft.checkpoint import CheckpointInfo, restore_training
from cvft.distributed import current_world, wrap_ddp
from cvft.engine import DivergenceError, EpochReport, StepReport, evaluate, train_epoch
from cvft.errors import TrainingError
from cvft.loss import build_loss
from cvft.model import CrossViewModel, build_model
from cvft.optim import build_optimizer, build_schedule
from cvft.preprocess import Preprocess
from jobs.config import DataConfig, ExperimentConfig
from jobs.entry import LINE_INTERVAL_S, LOGGER
from pipeline.cache import ShardCache, default_cache
from pipeline.checkpoints import CheckpointFolder, checkpoint_name, fetch
from pipeline.dataset import PairDataset
from pipeline.evaluation import Queries
from pipeline.loader import Loader
from pipeline.manifest import Manifest
from pipeline.storage import Store

Metrics = dict[str, float]
OnEpoch = Callable[[Metrics], None]


@dataclass(frozen=True, kw_only=True)
class History:
    """What a training remembers besides tensors; plain JSON within each checkpoint.

    Attributes:
        epochs: Numbers of each epoch that ended with a checkpoint.
        best: Name of the checkpoint with the highest R@1, the first of equals.
        best_recall_at_1: Its R@1.
    """

    epochs: list[Metrics] = field(default_factory=list)
    best: str = ""
    best_recall_at_1: float = -1.0

    def then(self, metrics: Metrics, name: str) -> History:
        """Return the history with one more epoch."""
        is_better = metrics["recall_at_1"] > self.best_recall_at_1
        return History(
            epochs=[*self.epochs, metrics],
            best=name if is_better else self.best,
            best_recall_at_1=max(metrics["recall_at_1"], self.best_recall_at_1),
        )


def checkpoints_of(config: ExperimentConfig) -> CheckpointFolder:
    """Return the folder of a run's checkpoints."""
    return CheckpointFolder(f"{config.folder}/checkpoints")


def train(config: ExperimentConfig, *, device: torch.device, on_epoch: OnEpoch) -> None:
    """Train from the newest checkpoint, or from the start, to the last epoch.

    Args:
        config: The experiment.
        device: Where this rank computes.
        on_epoch: Called on every rank after each checkpoint, with the epoch's numbers.

    Raises:
        CvftError: The configuration, the data or a checkpoint cannot be used.
    """
    training = _Training(config, device)
    for epoch in range(training.first_epoch, config.train.num_epochs):
        report = training.run_epoch(epoch)
        done = epoch + 1
        if done % config.train.evaluate_every == 0 or done == config.train.num_epochs:
            on_epoch(training.evaluate_and_save(done, report))


class _Training:
    """The parts of one rank's training, put together from a configuration and restored from the newest checkpoint."""

    def __init__(self, config: ExperimentConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._world = current_world()
        manifest = Manifest.load(config.data.manifest)
        self._manifest_digest = manifest.digest
        self._cache = _open_cache(config.data, manifest)
        self._train_set = PairDataset(manifest, config.data.train_split, cache=self._cache)
        self._train_loader = self._loader(self._train_set)
        self._eval_set = PairDataset(manifest, config.data.eval_split, cache=self._cache)
        self._num_eval_pairs = len(self._eval_set)
        splits = config.data.eval_split, config.data.train_split
        self._queries = Queries.of_split(manifest, splits[0], train_split=splits[1])
        self._eval_loader = self._loader(self._eval_set)
        self._preprocess = Preprocess(config.preprocess)
        self._augment = Augment(config.train.augment, config.preprocess)
        self._loss = build_loss(config.train.loss).to(device)
        torch.manual_seed(config.train.seed)  # the initial weights
        model = build_model(config.model, config.preprocess).to(device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        self._optimizer = build_optimizer(model, config.train.optimizer, loss=self._loss)
        self._num_steps = config.train.num_epochs * self._train_loader.num_steps
        self._schedule = build_schedule(config.train.optimizer, num_steps=self._num_steps)
        self._checkpoints = checkpoints_of(config)
        self.first_epoch, self._history = self._restore(model)
        self._model = model
        self._parallel = wrap_ddp(model)

    def run_epoch(self, epoch: int) -> EpochReport:
        """Train on every batch of an epoch."""
        batches = prefetch(self._train_loader.train_batches(epoch), self._device)
        self._eval_set.prefetch()  # its shards come after those of the epoch
        try:
            return train_epoch(
                self._parallel,
                batches,
                preprocess=self._preprocess,
                loss=self._loss,
                optimizer=self._optimizer,
                learning_rate=self._schedule,
                first_step=epoch * self._train_loader.num_steps,
                seed=self._config.train.seed,
                chunk_size=self._config.train.chunk_size,
                precision=self._config.train.precision,
                augment=self._augment,
                max_gradient_norm=self._config.train.optimizer.max_gradient_norm,
                on_step=_StepLines(self._num_steps) if self._world.rank == 0 else None,
            )
        except DivergenceError as error:
            keys = [self._train_set.keys[row] for row in error.index.tolist()]
            raise TrainingError(f"{error}; keys {keys}, pixels in {self._save_batch(error)}") from error

    def _save_batch(self, error: DivergenceError) -> str:
        """Write this rank's part of a batch on which the training diverged, and return the folder of all parts."""
        store, folder = Store.from_uri(self._config.folder), f"diverged/step-{error.step:08d}"
        names = "ground", "aerial", "index", "location_m"
        tensors = {name: getattr(error.batch, name).cpu().contiguous() for name in names}
        store.write_bytes(f"{folder}/rank-{self._world.rank}.safetensors", safetensors.torch.save(tensors))
        return store.uri(folder)

    def evaluate_and_save(self, done: int, report: EpochReport) -> Metrics:
        """Measure recall after `done` epochs; rank 0 writes the checkpoint."""
        result = evaluate(
            self._model,
            prefetch(self._eval_loader.eval_batches(), self._device),
            preprocess=self._preprocess,
            num_pairs=self._num_eval_pairs,
            location=self._queries.location,
        )
        recalls = self._queries.metrics(result)
        metrics = {
            "epoch": done,
            "step": done * self._train_loader.num_steps,
            "loss": report.loss,
            "pairs_per_s": report.pairs_per_s,
            **{name: value for name, value in recalls.items() if value is not None},
        }
        self._history = self._history.then(metrics, checkpoint_name(done))
        if self._world.rank == 0:
            info = CheckpointInfo(
                model=self._config.model,
                preprocess=self._config.preprocess,
                step=int(metrics["step"]),
                epoch=done,
                manifest_digest=self._manifest_digest,
                metrics=metrics,
                training=dataclasses.asdict(self._history),
            )
            name = self._checkpoints.save(model=self._model, info=info, optimizer=self._optimizer, loss=self._loss)
            self._checkpoints.keep({name, self._history.best})
            _log_epoch(metrics, self._config.train.num_epochs)
            if not self._eval_set.is_local:
                LOGGER.info("cache of shards: %s", self._cache.stats)
        return metrics

    def _restore(self, model: CrossViewModel) -> tuple[int, History]:
        names = self._checkpoints.names()
        if not names:
            return 0, History()
        newest = fetch(self._checkpoints.uri(names[-1]), cache=default_cache().parent)
        info = restore_training(
            newest,
            model=model,
            preprocess=self._config.preprocess,
            optimizer=self._optimizer,
            loss=self._loss,
        )
        LOGGER.info("going on from %s", self._checkpoints.uri(names[-1]))
        return info.epoch, History(**info.training)

    def _loader(self, dataset: PairDataset) -> Loader:
        return Loader(
            dataset,
            preprocess=self._config.preprocess,
            batch_size=self._config.train.batch_size,
            world_rank=self._world.rank,
            world_size=self._world.size,
            seed=self._config.train.seed,
            num_threads=self._config.data.num_threads,
            cold_start_window=self._config.data.cold_start_window,
        )


def _open_cache(data: DataConfig, manifest: Manifest) -> ShardCache:
    folder = Path(data.cache).expanduser() if data.cache else None
    cache = ShardCache(folder, limit_bytes=None if data.cache_gb is None else round(data.cache_gb * 1e9))
    if Store.from_uri(manifest.store_uri).local_path("") is None:
        for numbers in (manifest.split(split)["shard"].unique() for split in (data.train_split, data.eval_split)):
            cache.claim(manifest.shards[number] for number in numbers.to_pylist())
    return cache


class _StepLines:
    """One log line at intervals while steps go by."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._printed = time.monotonic()

    def __call__(self, report: StepReport) -> None:
        if time.monotonic() - self._printed < LINE_INTERVAL_S:
            return
        self._printed = time.monotonic()
        LOGGER.info(
            "step %d/%d: loss %.4f, %.1f pairs/s, waited %.0f %% for data",
            report.step + 1,
            self._num_steps,
            report.loss,
            report.pairs_per_s,
            100 * report.data_wait_s / (report.data_wait_s + report.step_s),
        )


def _log_epoch(metrics: Metrics, num_epochs: int) -> None:
    LOGGER.info(
        "epoch %d/%d: loss %.4f, R@1 %.2f %%, R@5 %.2f %%, R@10 %.2f %%, %.1f pairs/s",
        metrics["epoch"],
        num_epochs,
        metrics["loss"],
        *(100 * metrics[f"recall_at_{k}"] for k in (1, 5, 10)),
        metrics["pairs_per_s"],
    )


def read_history(info: CheckpointInfo) -> list[dict[str, Any]]:
    """Return the numbers of each epoch up to a checkpoint; none for imported weights."""
    return list(info.training.get("epochs", []))
