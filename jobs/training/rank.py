"""The parts of one rank's training, put together from a configuration and restored from the newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import safetensors.torch
import torch

from cvft.augment import Augment
from cvft.averaging import WeightAverage
from cvft.batch import Batch, prefetch
from cvft.distributed import current_world, wrap_ddp
from cvft.engine import Descriptors, DivergenceError, StepReport, embed, train_epoch
from cvft.errors import StoreError, TrainingError
from cvft.loss import build_loss
from cvft.model import build_model
from cvft.optim import build_optimizer, build_schedule
from cvft.preprocess import Preprocess
from jobs.config import DataConfig, ExperimentConfig
from jobs.entry import LOGGER
from jobs.metrics import CacheMetrics
from jobs.training.progress import AverageOwner, Curve, History, Metrics, StateOwner, StepLines, log_evaluation
from jobs.training.saving import Saver
from pipeline.cache import ShardCache
from pipeline.checkpoint_writer import OnWritten
from pipeline.dataset import PairDataset
from pipeline.evaluation import Queries
from pipeline.kept_pixels import require_room
from pipeline.loader import Loader
from pipeline.manifest import Manifest
from pipeline.mining import HardNegatives, Places
from pipeline.sampler import Indices, check_fills
from pipeline.storage import Store

OnStep = Callable[[StepReport], None]
ShouldLeave = Callable[[int], bool]


class Training:
    """One rank's training; its position is the number of steps done.

    Attributes:
        step: Steps done.
        history: The evaluations so far.
        owners: The parts with state of their own by name, which goes into every checkpoint.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        device: torch.device,
        *,
        on_step: OnStep | None = None,
        should_leave: ShouldLeave | None = None,
        guard: Callable[[], None] | None = None,
        on_saved: OnWritten | None = None,
    ) -> None:
        """Build or restore all parts; arguments and errors are those of `jobs.training.worker.train`."""
        self._config = config
        self._device = device
        self._on_step = on_step
        self._should_leave = should_leave
        self._is_leaving = False
        self._world = current_world()
        manifest = self._open_data()
        self._preprocess = Preprocess(config.preprocess)
        self._augment = Augment(config.train.augment, config.preprocess)
        self._loss = build_loss(config.train.loss).to(device)
        torch.manual_seed(config.train.seed)  # the initial weights
        model = build_model(config.model, config.preprocess).to(device)
        self._model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
        if config.train.activation_checkpointing:
            self._model.recompute_activations()
        if config.train.compile:
            self._model.compile_trunks()
        decay = config.train.ema_decay
        self._average = None if decay is None else WeightAverage(self._model, decay=decay)
        self._optimizer = build_optimizer(self._model, config.train.optimizer, loss=self._loss)
        self._steps_per_epoch = self._train_loader.num_steps
        self._num_steps = config.train.num_epochs * self._steps_per_epoch
        self._schedule = build_schedule(config.train.optimizer, num_steps=self._num_steps)
        self._lines = StepLines(self._num_steps, device)
        self._curve = Curve()
        self._cache_metrics = CacheMetrics(config.name, self._world.rank)
        self.step = 0
        self.history = History()
        self.owners: dict[str, StateOwner] = {"curve": self._curve}
        if self._hard_negatives is not None:
            self.owners["neighbours"] = self._hard_negatives
        if self._average is not None:
            self.owners["average"] = AverageOwner(self._average)
        self._saver = Saver(
            config,
            model=self._model,
            optimizer=self._optimizer,
            loss=self._loss,
            owners=self.owners,
            manifest_digest=manifest.digest,
            guard=guard,
            weights=None if self._average is None else self._average.weights,
            on_saved=on_saved,
        )
        info = self._saver.restore()
        if info is not None:
            self.step, self.history = info.step, History(**info.training)
        self._parallel = wrap_ddp(self._model)

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the step is the end of an epoch that is to be evaluated and is not yet."""
        epoch, epoch_step = divmod(self.step, self._steps_per_epoch)
        if epoch == 0 or epoch_step or self.history.has_evaluated(epoch):
            return False
        return epoch % self._config.train.evaluate_every == 0 or epoch == self._config.train.num_epochs

    @property
    def is_over(self) -> bool:
        """Whether all epochs are trained and evaluated, or the training has stopped early."""
        train = self._config.train
        return self.history.is_finished(num_epochs=train.num_epochs, patience=train.early_stopping)

    def run_epoch(self) -> bool:
        """Train from where the training stands to the end of that epoch.

        Returns:
            Whether it may go on; False where it was told to leave, after a checkpoint of that very step.

        Raises:
            CvftError: A batch cannot be trained on, or a checkpoint could not be written.
        """
        epoch, epoch_step = divmod(self.step, self._steps_per_epoch)
        if epoch_step == 0:
            self._curve.begin_epoch()
        if self._hard_negatives is not None:
            self._hard_negatives.prepare(epoch, lambda: self._embed(self._train_loader, self._train_set))
        batches = prefetch(self._train_loader.train_batches(epoch, epoch_step), self._device)
        self._eval_set.prefetch()  # its shards come after those of the epoch
        try:
            train_epoch(
                self._parallel,
                self._until_told_to_leave(batches),
                preprocess=self._preprocess,
                loss=self._loss,
                optimizer=self._optimizer,
                learning_rate=self._schedule,
                first_step=self.step,
                seed=self._config.train.seed,
                chunk_size=self._config.train.chunk_size,
                precision=self._config.train.precision,
                augment=self._augment,
                max_gradient_norm=self._config.train.optimizer.max_gradient_norm,
                on_step=self._after_step,
            )
        except DivergenceError as error:
            keys = [self._train_set.keys[row] for row in error.index.tolist()]
            raise TrainingError(f"{error}; keys {keys}, pixels in {self._save_batch(error)}") from error
        return not self._is_leaving

    def evaluate_and_save(self) -> Metrics:
        """Measure recall and save, as on every rank; rank 0 writes."""
        epoch, first = self.step // self._steps_per_epoch, self.step - self._steps_per_epoch
        pairs_per_s = self._steps_per_epoch * self._config.train.batch_size / self._curve.seconds
        with nullcontext() if self._average is None else self._average.applied():
            found = self._embed(self._eval_loader, self._eval_set)
        recalls = self._queries.rank(found, hit_distance_m=self._config.data.hit_distance_m).metrics()
        metrics = {
            "epoch": epoch,
            "step": self.step,
            "loss": self._curve.mean(first, self.step),
            "pairs_per_s": pairs_per_s,
            **{name: value for name, value in recalls.items() if value is not None},
        }
        self.history = self.history.then(metrics)
        self._save(metrics)
        if self._world.rank == 0:
            log_evaluation(metrics, self._config.train.num_epochs)
            if not self._eval_set.is_local:
                LOGGER.info("cache of shards: %s", self._cache.stats)
        return metrics

    def save_now(self) -> None:
        """Save at this very step; returns on every rank once the checkpoint is durable.

        Raises:
            CvftError: It could not be written; on every rank.
        """
        if not self._saver.has_saved(self.step):
            self._save()
        self.finish()

    def finish(self) -> None:
        """Wait on every rank until all checkpoints are durable; see `Saver.finish`."""
        self._saver.finish()

    def settle(self) -> None:
        """After a failure: give a checkpoint that is on its way a moment."""
        self._saver.settle()

    def _after_step(self, report: StepReport) -> None:
        """All that happens between two steps, on every rank."""
        self.step = report.step + 1
        self._curve.losses.append(report.loss)
        if self._average is not None:
            self._average.update(report.step)
        self._cache_metrics.show(self._cache.stats)
        self._saver.check()
        every = self._config.train.checkpoint_every_steps
        if every is not None and self.step % every == 0 and not self.is_evaluation_due:
            self._save()
        if self._world.rank == 0:
            self._lines(report)
        if self._on_step is not None:
            self._on_step(report)
        if self._should_leave is not None and self._should_leave(self.step):
            self.save_now()
            self._is_leaving = True

    def _until_told_to_leave(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch
            if self._is_leaving:
                return

    def _embed(self, loader: Loader, dataset: PairDataset) -> Descriptors:
        batches = prefetch(loader.eval_batches(), self._device)
        return embed(self._model, batches, preprocess=self._preprocess, num_pairs=len(dataset))

    def _save(self, metrics: Metrics | None = None) -> None:
        steps = self._steps_per_epoch
        self._saver.save(step=self.step, steps_per_epoch=steps, history=self.history, metrics=metrics or {})

    def _save_batch(self, error: DivergenceError) -> str:
        """Write this rank's part of a batch on which the training diverged, and say where all parts are."""
        store, folder = Store.from_uri(self._config.folder), f"diverged/step-{error.step:08d}"
        names = "ground", "aerial", "index", "location_m"
        tensors = {name: getattr(error.batch, name).cpu().contiguous() for name in names}
        try:
            store.write_bytes(f"{folder}/rank-{self._world.rank}.safetensors", safetensors.torch.save(tensors))
        except StoreError as failure:  # where the training diverged matters more
            return f"no file ({failure})"
        return store.uri(folder)

    def _open_data(self) -> Manifest:
        data = self._config.data
        manifest = Manifest.load(data.manifest)
        self._cache = _open_cache(data, manifest, patience_s=self._config.train.store_patience_s)
        self._train_set = PairDataset(manifest, data.train_split, cache=self._cache)
        check_fills(len(self._train_set), batch_size=self._config.train.batch_size)
        self._hard_negatives = _hard_negatives(self._config, manifest, self._device)
        order = None if self._hard_negatives is None else self._hard_negatives.order
        self._train_loader = self._loader(self._train_set, order=order)
        self._eval_set = PairDataset(manifest, data.eval_split, cache=self._cache)
        self._eval_loader = self._loader(self._eval_set)
        if keep_on := self._keep_on():  # each fits alone; nothing is decoded yet
            both = self._train_loader.kept_bytes + self._eval_loader.kept_bytes
            require_room(both, keep_on, what=f"splits {data.train_split!r} and {data.eval_split!r} together")
        self._queries = Queries.of_split(manifest, data.eval_split, train_split=data.train_split)
        return manifest

    def _keep_on(self) -> torch.device | None:
        return {"never": None, "host": torch.device("cpu"), "device": self._device}[self._config.data.keep_pixels]

    def _loader(self, dataset: PairDataset, order: Callable[[int], Indices] | None = None) -> Loader:
        return Loader(
            dataset,
            preprocess=self._config.preprocess,
            batch_size=self._config.train.batch_size,
            world_rank=self._world.rank,
            world_size=self._world.size,
            seed=self._config.train.seed,
            num_threads=self._config.data.num_threads,
            cold_start_window=self._config.data.cold_start_window,
            keep_on=self._keep_on(),
            order=order,
        )


def _hard_negatives(config: ExperimentConfig, manifest: Manifest, device: torch.device) -> HardNegatives | None:
    train, sampling = config.train, config.train.sampling
    if sampling.kind == "random":
        return None
    places = Places.of_split(
        manifest,
        config.data.train_split,
        min_distance_m=sampling.min_distance_m,
        mask_distance_m=train.loss.mask_distance_m,
    )
    return HardNegatives(sampling, places, batch_size=train.batch_size, seed=train.seed, device=device)


def _open_cache(data: DataConfig, manifest: Manifest, *, patience_s: float) -> ShardCache:
    folder = Path(data.cache).expanduser() if data.cache else None
    limit_bytes = None if data.cache_gb is None else round(data.cache_gb * 1e9)
    cache = ShardCache(folder, limit_bytes=limit_bytes, patience_s=patience_s)
    if Store.from_uri(manifest.store_uri).local_path("") is None:
        for numbers in (manifest.split(split)["shard"].unique() for split in (data.train_split, data.eval_split)):
            cache.claim(manifest.shards[number] for number in numbers.to_pylist())
    return cache
