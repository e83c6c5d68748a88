"""A training's checkpoints: which one to go on from, and how new ones come about while it goes on.

Rank 0 decides and writes; the others are told. No random state is kept: order, dropout, augmentation and learning rate
are functions of seed, step and pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

from cvft.checkpoint import CheckpointInfo, read_state, restore_training
from cvft.distributed import from_rank_0
from cvft.loss import Loss
from cvft.model import CrossViewModel
from cvft.snapshot import take_snapshot
from jobs.config import ExperimentConfig
from jobs.entry import LOGGER
from jobs.training.progress import History, StateOwner
from pipeline.cache import default_cache
from pipeline.checkpoint_writer import CheckpointWriter, OnWritten
from pipeline.checkpoints import CheckpointFolder, checkpoint_name, fetch
from pipeline.patience import patiently

_SETTLE_S = 30.0


def checkpoints_of(config: ExperimentConfig) -> CheckpointFolder:
    """Return the folder of a run's checkpoints."""
    return CheckpointFolder(f"{config.folder}/checkpoints")


def newest_of(config: ExperimentConfig) -> tuple[str, Path] | None:
    """Return name and local directory of a run's newest whole checkpoint, as `CheckpointFolder.newest_whole` does."""
    checkpoints, cache = checkpoints_of(config), default_cache().parent
    return patiently(lambda: checkpoints.newest_whole(cache=cache), patience_s=config.train.store_patience_s)


class Saver:
    """Restores a training from its newest whole checkpoint and saves it from then on."""

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        model: CrossViewModel,
        optimizer: Optimizer,
        loss: Loss,
        owners: Mapping[str, StateOwner],
        manifest_digest: str,
        guard: Callable[[], None] | None = None,
        weights: Callable[[], Mapping[str, Tensor]] | None = None,
        on_saved: OnWritten | None = None,
    ) -> None:
        """Take hold of what is saved.

        `guard` and `on_saved` are those of `jobs.training.worker.train`, `weights` is that of `take_snapshot`.
        """
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._loss = loss
        self._owners = owners
        self._manifest_digest = manifest_digest
        self._guard = guard
        self._weights = weights
        self._on_saved = on_saved
        self._folder = checkpoints_of(config)
        self._writer: CheckpointWriter | None = None  # on rank 0 alone
        self._last_name = ""

    def restore(self) -> CheckpointInfo | None:
        """Put the newest whole checkpoint into all parts of the training, on every rank the same one.

        Returns:
            What it says about itself; None if there is none.

        Raises:
            CheckpointError: All are damaged, or it is one of another configuration.
        """
        name = from_rank_0(self._choose)
        if name is None:
            return None
        cache, patience_s = default_cache().parent, self._config.train.store_patience_s
        directory = patiently(lambda: fetch(self._folder.uri(name), cache=cache), patience_s=patience_s)
        info = restore_training(
            directory,
            model=self._model,
            preprocess=self._config.preprocess,
            optimizer=self._optimizer,
            loss=self._loss,
        )
        for owner, part in self._owners.items():
            state = read_state(directory, owner)
            if state is not None:
                part.restore(state)
        if self._writer is not None:
            LOGGER.info("going on from %s", self._folder.uri(name))
        return info

    def _choose(self) -> str | None:
        found = newest_of(self._config)
        name = None if found is None else found[0]
        # Newer ones than the newest whole one are damaged: they go once there is another one to go on from.
        names = self._folder.names()
        self._writer = CheckpointWriter(
            self._folder,
            present=names[: names.index(name) + 1] if name else [],
            keep_last=self._config.train.keep_last,
            patience_s=self._config.train.store_patience_s,
            guard=self._guard,
            on_written=self._on_saved,
        )
        return name

    def save(self, *, step: int, steps_per_epoch: int, history: History, metrics: Mapping[str, float]) -> None:
        """Have a checkpoint written in the background; on other ranks than 0 this does nothing.

        Raises:
            CvftError: An earlier checkpoint could not be written.
        """
        if self._writer is None:
            return
        epoch, epoch_step = divmod(step, steps_per_epoch)
        info = CheckpointInfo(
            model=self._config.model,
            preprocess=self._config.preprocess,
            step=step,
            epoch=epoch,
            epoch_step=epoch_step,
            manifest_digest=self._manifest_digest,
            metrics=dict(metrics),
            training=dataclasses.asdict(history),
        )
        snapshot = take_snapshot(
            model=self._model,
            info=info,
            optimizer=self._optimizer,
            loss=self._loss,
            states={owner: part.state() for owner, part in self._owners.items()},
            weights=None if self._weights is None else self._weights(),
        )
        self._last_name = checkpoint_name(step)
        self._writer.submit(self._last_name, snapshot, best=history.best)

    def has_saved(self, step: int) -> bool:
        """Tell whether rank 0 has begun to save at this very step."""
        return self._last_name == checkpoint_name(step)

    def check(self) -> None:
        """Raise what went wrong in the background.

        Raises:
            CvftError: A checkpoint could not be written.
        """
        if self._writer is not None:
            self._writer.check()

    def finish(self) -> None:
        """Wait on every rank until all checkpoints are durable; every rank must come here.

        Raises:
            CvftError: A checkpoint could not be written; on every rank.
        """
        from_rank_0(self._finish)

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.finish()

    def settle(self) -> None:
        """After a failure: give a checkpoint that is on its way a moment."""
        if self._writer is not None:
            self._writer.settle(timeout_s=_SETTLE_S)
