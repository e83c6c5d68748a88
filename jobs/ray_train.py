"""The training on Ray: one DDP process per worker, restarted from the newest checkpoint when one is lost."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from cvft.configuration import parse, to_plain
from cvft.distributed import current_world
from cvft.errors import ClusterError, CvftError, TrainingError
from jobs import worker
from jobs.cluster import ray_session
from jobs.config import ExperimentConfig
from jobs.entry import log_to_stderr
from jobs.progress import Metrics
from pipeline.storage import Store
from pipeline.tracking.runs import Run

_USER_ERROR_FILE = "user_error.json"


def train_on_ray(config: ExperimentConfig, run: Run) -> None:
    """Train with `config.train.workers` workers.

    Raises:
        ClusterError: A Ray started here has too few GPUs.
        TrainingError: A worker met an error that no restart can mend; the message is its own.
    """
    resources = {"CPU": 1, "GPU": 1} if config.train.use_gpu else {"CPU": 1}
    store = Store.from_uri(config.folder)
    store.delete(_USER_ERROR_FILE)
    filesystem, path = store.arrow
    with ray_session(num_cpus=config.train.workers):
        _require_gpus(config)
        trainer = TorchTrainer(
            _run_worker,
            train_loop_config={"config": to_plain(config), "run": dataclasses.asdict(run)},
            torch_config=TorchConfig(backend="nccl" if config.train.use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.train.workers, use_gpu=config.train.use_gpu, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError:
            _raise_user_error(store)
            raise
    _raise_user_error(store)


def _require_gpus(config: ExperimentConfig) -> None:
    # A cluster may grow the GPUs it lacks; a Ray on this machine will not.
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.train.use_gpu and num_gpus < config.train.workers and not os.environ.get("RAY_ADDRESS"):
        workers = config.train.workers
        raise ClusterError(f"train.use_gpu: {workers} workers want a GPU each, this machine has {num_gpus}")


def _raise_user_error(store: Store) -> None:
    if store.exists(_USER_ERROR_FILE):
        raise TrainingError(json.loads(store.read_bytes(_USER_ERROR_FILE))["message"])


def _run_worker(settings: dict[str, Any]) -> None:
    """Train as one Ray Train worker."""
    log_to_stderr()
    config = parse(ExperimentConfig, settings["config"])
    run = Run(**settings["run"])
    store = Store.from_uri(config.folder)
    if store.exists(_USER_ERROR_FILE):
        return  # restarted after an error that no restart can mend; the driver raises it

    def on_epoch(metrics: Metrics) -> None:
        if current_world().rank == 0:
            run.log_metrics(metrics, step=int(metrics["step"]))
        ray.train.report(metrics)

    try:
        worker.train(config, device=ray.train.torch.get_device(), on_epoch=on_epoch)
    except CvftError as error:
        store.write_bytes(_USER_ERROR_FILE, json.dumps({"message": str(error)}).encode())
        raise
