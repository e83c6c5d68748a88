"""Train a network on a manifest: Ray Train with one DDP process per worker, or this process alone.

    python -m jobs.train --config town data.manifest=demo/shards/manifests/0123.parquet train.workers=1

The run's name decides where it lives: the same name and configuration continues it, a finished run is only reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from cvft.checkpoint import read_info
from cvft.configuration import dotted_values, parse, to_plain
from cvft.distributed import current_world
from cvft.errors import ConfigError, CvftError, TrainingError
from jobs import entry, worker
from jobs.cluster import ray_session
from jobs.commit import code_commit
from jobs.config import ExperimentConfig, load
from pipeline.checkpoints import checkpoint_name, fetch
from pipeline.dataset import default_cache
from pipeline.manifest import Manifest
from pipeline.storage import Store
from pipeline.tracking.runs import Run, open_run
from pipeline.tracking.server import prepare

RUN_FILE = "run.json"
_USER_ERROR_FILE = "user_error.json"
# What may differ when a run is continued: none of it changes the numbers by more than rounding.
_FREE_KEYS = ("train.workers", "train.use_gpu", "train.max_failures", "data.num_threads", "data.cache", "data.manifest")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--config FILE key=value ...`."""
    parser.add_argument("--config", required=True, help="YAML file, or the name of a preset: official, town")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides: train.loss.gamma=12")


def train(config: ExperimentConfig) -> dict[str, Any]:
    """Train, or go on training, as configured and return the result of the best checkpoint.

    Raises:
        CvftError: The configuration, the data, the store or the run's folder cannot be used.
    """
    manifest = Manifest.load(config.data.manifest)
    for split in (config.data.train_split, config.data.eval_split):
        manifest.split(split)  # refuse a wrong name before anything starts
    backbone = config.model.backbone
    if backbone.weights is None and backbone.num_frozen_blocks:
        entry.LOGGER.warning(
            "model.backbone.weights is not set: the %d frozen blocks stay at their random values",
            backbone.num_frozen_blocks,
        )
    run = _open_run(config, manifest)
    if _epochs_done(config) >= config.train.num_epochs:
        entry.LOGGER.info("run %s is up to date: all %d epochs are done", config.name, config.train.num_epochs)
    elif config.train.workers == 1:
        device = torch.device("cuda" if config.train.use_gpu else "cpu")
        worker.train(config, device=device, on_epoch=_Recorder(run))
    else:
        _train_on_ray(config, run)
    run.finish()
    return _result(config, run)


def _open_run(config: ExperimentConfig, manifest: Manifest) -> Run:
    """Open the MLflow run of this training's folder; one of the same configuration goes on."""
    store = Store.from_uri(folder_of(config))
    plain = to_plain(config)
    if store.exists(RUN_FILE):
        _refuse_other_configuration(plain, json.loads(store.read_bytes(RUN_FILE)), manifest)
    store.write_bytes(RUN_FILE, json.dumps({"manifest_digest": manifest.digest, "config": plain}, indent=2).encode())
    tracking = prepare(config.tracking.uri, experiment=config.tracking.experiment)
    run = open_run(
        tracking,
        name=config.name,
        identity=store.uri(),
        config=plain,
        commit=code_commit(),
        tags={"manifest_digest": manifest.digest},
    )
    run.log_dataset(
        name=manifest.layout,
        digest=manifest.digest,
        source=manifest.uri,
        context="training",
        profile={"pairs": manifest.splits},
    )
    return run


def _refuse_other_configuration(plain: dict[str, Any], known: dict[str, Any], manifest: Manifest) -> None:
    then, now = dotted_values(known["config"]), dotted_values(plain)
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    changed = [f"{key}={now.get(key)!r} (was {then.get(key)!r})" for key in changed if key not in _FREE_KEYS]
    if known["manifest_digest"] != manifest.digest:
        changed.append(f"manifest {manifest.digest[:16]} (was {known['manifest_digest'][:16]})")
    if changed:
        raise ConfigError(
            f"name: run {plain['name']!r} was begun otherwise: {', '.join(changed)}; choose another name="
        )


def _train_on_ray(config: ExperimentConfig, run: Run) -> None:
    resources = {"CPU": 1, "GPU": 1} if config.train.use_gpu else {"CPU": 1}
    store = Store.from_uri(folder_of(config))
    store.delete(_USER_ERROR_FILE)
    filesystem, path = store.arrow
    with ray_session(num_cpus=config.train.workers):
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
        trainer.fit()
    if store.exists(_USER_ERROR_FILE):
        raise TrainingError(json.loads(store.read_bytes(_USER_ERROR_FILE))["message"])


def _run_worker(settings: dict[str, Any]) -> None:
    """Train as one Ray Train worker."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config = parse(ExperimentConfig, settings["config"])
    store = Store.from_uri(folder_of(config))
    if store.exists(_USER_ERROR_FILE):
        return  # restarted after an error that no restart can mend; the driver raises it
    try:
        worker.train(config, device=ray.train.torch.get_device(), on_epoch=_Recorder(Run(**settings["run"])))
    except CvftError as error:
        store.write_bytes(_USER_ERROR_FILE, json.dumps({"message": str(error)}).encode())
        raise


class _Recorder:
    """Sends an epoch's numbers to MLflow from rank 0, and to Ray where it runs there."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __call__(self, metrics: worker.Metrics) -> None:
        world = current_world()
        if world.rank == 0:
            self._run.log_metrics(metrics, step=int(metrics["step"]))
        if world.size > 1:
            ray.train.report(metrics)


def folder_of(config: ExperimentConfig) -> str:
    """Return the URI of a run's folder."""
    return f"{config.output.rstrip('/')}/{config.name}"


def _epochs_done(config: ExperimentConfig) -> int:
    checkpoints = worker.checkpoints_of(config)
    names = checkpoints.names()
    return read_info(fetch(checkpoints.uri(names[-1]), cache=default_cache().parent)).epoch if names else 0


def _result(config: ExperimentConfig, run: Run) -> dict[str, Any]:
    checkpoints = worker.checkpoints_of(config)
    newest = read_info(fetch(checkpoints.uri(checkpoints.names()[-1]), cache=default_cache().parent))
    history = worker.History(**newest.training)
    (best,) = (metrics for metrics in history.epochs if checkpoint_name(int(metrics["epoch"])) == history.best)
    return {
        "run_id": run.run_id,
        "checkpoint": checkpoints.uri(history.best),
        **best,
        "step": int(best["step"]),
        "epoch": int(best["epoch"]),
        "epochs_done": newest.epoch,
    }


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    return train(load(arguments.config, arguments.overrides))


JOB = entry.Job(
    name="train",
    summary="Train a network on a manifest; the same name goes on where it stopped.",
    example="cvft train --config town data.manifest=$(ls demo/shards/manifests/*.parquet) train.workers=1 name=mine",
    add_arguments=add_config_arguments,
    run=_run,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
