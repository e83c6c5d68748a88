"""The training on Ray: one DDP process per worker, restarted from the newest checkpoint when one is lost.

A worker or a node that is lost without notice costs the steps since the last checkpoint and one of
`train.max_failures`. Where a node says that it is about to go, and where an elastic training may grow, all workers save
at that very step and return, and the driver starts them again: no step is lost and no failure is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import warnings
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution import context as execution_context
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.placement_group import PlacementGroup

from cvft.configuration import parse, to_plain
from cvft.distributed import current_world, from_rank_0
from cvft.errors import ClusterError, CvftError, TrainingError
from jobs import pictures, tracked
from jobs.cluster import ray_session
from jobs.config import ExperimentConfig, TrainConfig
from jobs.entry import LOGGER, log_to_stderr
from jobs.room import await_room
from jobs.training import attempts, worker
from jobs.training.coordinator import LookAnew, coordinator_on_head, look_anew
from jobs.training.leaving import ROOM, Leaving
from jobs.training.lost_workers import LostWorkers, describe_failures, is_loss, waiting_is_told
from jobs.training.process_group import ProcessGroup
from jobs.training.progress import Metrics
from jobs.training.releasing import abort, sigterm_as_ctrl_c
from pipeline.storage import Store
from pipeline.tracking.runs import Run

_USER_ERROR_FILE = "user_error.json"
_ROOM_FILE = "placement_group"  # of a trial of Tune: what its workers hold
_NEVER_S = 1e9


def train_on_ray(config: ExperimentConfig, run: Run, *, is_trial: bool = False) -> None:
    """Train with `config.train.workers` workers.

    Args:
        config: The experiment.
        run: Its run in MLflow.
        is_trial: Called within a trial of Tune, which is told of every evaluation once its checkpoint is durable.

    Raises:
        ClusterError: The cluster has no room for the workers, and never will; or workers were lost more often than
            `train.max_failures` allows.
        TakenOverError: The same run was started again elsewhere, and goes on there.
        TrainingError: A worker met an error that no restart can mend; the message is its own.
    """
    store = Store.from_uri(config.folder)
    store.delete(_USER_ERROR_FILE)
    attempt = attempts.begin_attempt(store)
    room_s = config.train.resize_after_s
    settings = {"run": dataclasses.asdict(run), "attempt": attempt, "is_durable": is_trial}
    if config.train.min_workers < config.train.max_workers:
        # Ray's view of the cluster may be 20 s old: do not wait much longer for room on a node that is lost.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "25")
    # Workers also meet in an actor of Ray's, to be told alike, where it would have them wait for ever.
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(config.train.collective_timeout_s)
    with ray_session(num_cpus=config.train.max_workers):
        workers = f"train.workers={config.train.min_workers}"
        resources, labels = _resources(config.train), config.train.node_labels
        await_room(config.train.min_workers, resources, what=workers, labels=labels)
        coordinator_on_head()
        told = contextlib.nullcontext() if is_trial else waiting_is_told(labels)  # trials of a search wait for others
        try:
            with told:
                while reason := _fit(config, {**settings, "room_s": room_s}):
                    LOGGER.info("starting the workers again from the checkpoint they left")
                    if reason == ROOM:
                        room_s *= 2  # where there was none after all, it is tried ever more rarely
                        look_anew()  # the room may be on a node that has just come
        except ray.train.TrainingFailedError as error:
            _raise_what_ended_it(store, attempt)
            if is_loss(error):
                what = describe_failures(error.worker_failures)
                raise ClusterError(
                    f"{what}; train.max_failures={config.train.max_failures} are used up: the same command goes on "
                    "from the newest checkpoint"
                ) from error
            raise
    _raise_what_ended_it(store, attempt)


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
    """Ray's own would end an interrupted training with exit code 0 or 1: here Ctrl-C is Python's, as in every job."""

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave things as they are; `fit` ends the controller."""
        self._controller = controller

    def fit(self) -> Any:
        """Train; interrupted, end the workers first, and give their nodes back."""
        with sigterm_as_ctrl_c():
            try:
                return super().fit()
            except KeyboardInterrupt:
                if self._controller is not None:
                    abort(self._controller)
                raise


def _fit(config: ExperimentConfig, settings: dict[str, Any]) -> str:
    """Train until it is over or the workers leave; return why they left, "" where it is over."""
    filesystem, path = Store.from_uri(config.folder).arrow
    train = config.train
    further = [LookAnew()] if train.min_workers < train.max_workers else []
    further += [TuneReportCallback()] if settings["is_durable"] else []
    trainer = _Trainer(
        _run_worker,
        train_loop_config={"config": to_plain(config), **settings},
        torch_config=ProcessGroup(backend="nccl" if train.use_gpu else "gloo", timeout_s=train.collective_timeout_s),
        scaling_config=ray.train.ScalingConfig(
            num_workers=train.workers,
            use_gpu=train.use_gpu,
            resources_per_worker=_resources(train),
            label_selector=train.node_labels or None,
            elastic_resize_monitor_interval_s=_NEVER_S,  # the workers themselves look, see `jobs.training.leaving`
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=train.max_failures),
            callbacks=[LostWorkers(max_failures=train.max_failures), *further],
        ),
    )
    return str(trainer.fit().return_value)


def _resources(train: TrainConfig) -> dict[str, float]:
    return {"CPU": 1, "GPU": 1} if train.use_gpu else {"CPU": 1}


def room_of(folder: str) -> PlacementGroup | None:
    """Return the placement group that the workers of a trial of Tune hold, or held, or none.

    Tune ends a trial by ending its process, and Ray Train then leaves the workers' placement group behind.

    Raises:
        StoreError: The trial's folder cannot be read.
    """
    store = Store.from_uri(folder)
    if not store.exists(_ROOM_FILE):
        return None
    identity = type(PlacementGroup.empty().id)
    return PlacementGroup(identity(store.read_bytes(_ROOM_FILE)))


def _raise_what_ended_it(store: Store, attempt: str) -> None:
    attempts.check_current(store, attempt)
    if store.exists(_USER_ERROR_FILE):
        raise TrainingError(json.loads(store.read_bytes(_USER_ERROR_FILE))["message"])


def _log_what_is_ours() -> None:
    log_to_stderr()
    # Ray would print all metrics of each evaluation, on each rank; it names this logger by its file.
    logging.getLogger(execution_context.__file__).setLevel(logging.WARNING)
    # Of kernels of one pixel, whose two strides mean the same.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


def _run_worker(settings: dict[str, Any]) -> str:
    """Train as one Ray Train worker; return why it left, "" where the training is over."""
    _log_what_is_ours()
    config = parse(ExperimentConfig, settings["config"])
    run = Run(**settings["run"])
    store = Store.from_uri(config.folder)
    is_first = current_world().rank == 0
    if from_rank_0(lambda: store.exists(_USER_ERROR_FILE) or not attempts.is_current(store, settings["attempt"])):
        return ""  # restarted after an error that no restart can mend; the driver raises it
    if is_first and settings["is_durable"]:
        store.write_bytes(_ROOM_FILE, ray.util.get_current_placement_group().id.binary())
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)  # the worker's one CPU; the order of sums, and so the last bit, hangs on it

    leaving = Leaving(
        every_steps=config.train.preemption_check_every_steps,
        max_workers=config.train.max_workers,
        resources=_resources(config.train),
        labels=config.train.node_labels,
        room_s=settings["room_s"],
    )
    mine = attempts.Claim(store, settings["attempt"])
    try:
        group = from_rank_0(lambda: attempts.claim(store, settings["attempt"]).group)
        mine = dataclasses.replace(mine, group=group)
        with contextlib.ExitStack() as stack:
            record = stack.enter_context(tracked.Recorder(config, run, device)) if is_first else None

            def on_epoch(metrics: Metrics) -> None:
                if record is not None:
                    record.on_epoch(metrics)
                ray.train.report(metrics)

            is_over = worker.train(
                config,
                device=device,
                on_epoch=on_epoch,
                on_step=None if record is None else record.on_step,
                should_leave=leaving,
                guard=mine.check if is_first else None,
                on_saved=None if record is None else record.on_saved,
                is_durable=settings["is_durable"],
            )
        if is_first and is_over:
            pictures.log_pictures(config, run, device=device)
    except attempts.TakenOverError:
        raise
    except CvftError as error:
        _tell(error, mine)
        raise
    return "" if is_over else leaving.reason


def _tell(error: CvftError, mine: attempts.Claim) -> None:
    """Leave an error that no restart can mend to the driver.

    A host that was cut off may come back with one, that it did not reach the store, when others have long gone on.
    """
    if mine.is_last() if mine.group else attempts.is_current(mine.store, mine.attempt):
        mine.store.write_bytes(_USER_ERROR_FILE, json.dumps({"message": str(error)}).encode())
