"""Train a network on a manifest: Ray Train with one DDP process per worker, or this process alone.

    python -m jobs.train --config town data.manifest=demo/shards/manifests/0123.parquet train.workers=1

The run's name decides where it lives: the same name and configuration continues it, a finished run is only reported.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, replace
from typing import Any

import torch

from cvft.checkpoint import CheckpointInfo, read_info
from cvft.configuration import to_plain
from cvft.errors import ClusterError, ConfigError
from jobs import entry, pictures, run_file, tracked
from jobs.config import ExperimentConfig, load, preset_names
from jobs.registering import register_checkpoint
from jobs.training import attempts, worker
from jobs.training.progress import History, read_history
from jobs.training.ray_train import train_on_ray
from jobs.training.saving import checkpoints_of, newest_of
from pipeline.cache import default_cache
from pipeline.checkpoints import fetch
from pipeline.decoding import check_profile
from pipeline.evaluation import require_positions
from pipeline.manifest import Manifest
from pipeline.storage import Store
from pipeline.tracking.runs import Run, opened


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--config FILE key=value ...`."""
    presets = ", ".join(preset_names())
    parser.add_argument("--config", required=True, help=f"YAML file, or the name of a preset: {presets}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides: train.loss.gamma=12")


def train(config: ExperimentConfig) -> dict[str, Any]:
    """Train, or go on training, as configured; register the best checkpoint if the configuration names a model.

    Returns:
        Run (empty if MLflow has been away all the time), best checkpoint, its numbers, and the registered version if
        there is one.

    Raises:
        CvftError: The configuration, the data, the store or the run's folder cannot be used.
    """
    config = config.located()
    manifest = Manifest.load(config.data.manifest)
    # A store's pointer may move on while workers are restarted: all of them read this manifest.
    config = replace(config, data=replace(config.data, manifest=manifest.uri))
    _check(config, manifest)
    run = _open_run(config, manifest)
    try:
        if _is_finished(config):
            entry.LOGGER.info("run %s is up to date: there is nothing left to train", config.name)
        elif _is_here(config):
            device = torch.device("cuda" if config.train.use_gpu else "cpu")
            store = Store.from_uri(config.folder)
            guard = attempts.claim(store, attempts.begin_attempt(store)).check
            with tracked.Recorder(config, run, device) as record:
                worker.train(config, device=device, guard=guard, **record.hooks)
            pictures.log_pictures(config, run, device=device)
        else:
            train_on_ray(config, run)
        info = _newest_info(config)
        result = _result(config, info)
        if config.tracking.registered_model is not None:
            result |= register(config, run, result)
    except attempts.TakenOverError:  # the run goes on elsewhere, in MLflow too
        raise
    except BaseException as error:
        tracked.finish_run(config, run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    return {"run_id": tracked.finish_run(config, run, "FINISHED", evaluations=read_history(info)), **result}


def register(config: ExperimentConfig, run: Run, result: dict[str, Any], *, data_licence: str = "") -> dict[str, Any]:
    """Register the best checkpoint of a training, unless it is registered, and move the alias to it.

    Returns:
        `model`, the URI by which MLflow loads it, and `version`.

    Raises:
        StoreError: MLflow cannot take it now; the same command does it later.
    """
    name, alias = config.tracking.registered_model, config.tracking.alias
    if name is None:
        raise ConfigError("tracking.registered_model: set a name to register a model under")
    run = opened(run)
    checkpoint = fetch(result["checkpoint"], cache=default_cache().parent)
    version = register_checkpoint(run, checkpoint, name=name, alias=alias, data_licence=data_licence)
    return {"model": f"models:/{name}@{alias}", "version": version}


def _is_here(config: ExperimentConfig) -> bool:
    """Tell whether this process trains by itself; a cluster has nodes for it, where one worker is enough too."""
    return config.train.max_workers == 1 and not os.environ.get("RAY_ADDRESS")


def _check(config: ExperimentConfig, manifest: Manifest) -> None:
    """Refuse what cannot work before anything is written."""
    for split in (config.data.train_split, config.data.eval_split):
        manifest.split(split)
    require_positions(manifest, config.data.eval_split, hit_distance_m=config.data.hit_distance_m)
    check_profile(config.preprocess, manifest.profile, where=manifest.uri)
    if config.train.use_gpu and _is_here(config) and not torch.cuda.is_available():
        raise ClusterError("train.use_gpu: this machine has no GPU that torch can use; set train.use_gpu=false")
    backbone = config.model.backbone
    if backbone.weights is None and backbone.num_frozen_blocks:
        entry.LOGGER.warning(
            "model.backbone.weights is not set: the %d frozen blocks stay at their random values",
            backbone.num_frozen_blocks,
        )


def _open_run(config: ExperimentConfig, manifest: Manifest) -> Run:
    """Open the MLflow run of this training's folder; one of the same configuration goes on."""
    content, is_continued = run_file.enter(config, manifest, remedy="choose another name=")
    known_run = Run(**content["run"]) if "run" in content else None
    run = tracked.open_run(config, manifest, known=known_run, is_continued=is_continued)
    if run != known_run:
        run_file.write(Store.from_uri(config.folder), {**content, "run": asdict(run)})
    return run


def _newest_info(config: ExperimentConfig) -> CheckpointInfo:
    found = newest_of(config)
    if found is None:
        raise RuntimeError(f"{config.folder}: the training ended without a checkpoint")
    return read_info(found[1])


def _is_finished(config: ExperimentConfig) -> bool:
    found = newest_of(config)
    if found is None:
        return False
    history = History(**read_info(found[1]).training)
    return history.is_finished(num_epochs=config.train.num_epochs, patience=config.train.early_stopping)


def _result(config: ExperimentConfig, info: CheckpointInfo) -> dict[str, Any]:
    history = History(**info.training)
    return {
        "checkpoint": checkpoints_of(config).uri(history.best),
        "digest": info.manifest_digest,
        **history.best_metrics,
        "epochs_done": info.epoch,
        "stopped_early": info.epoch < config.train.num_epochs,
    }


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    return train(load(arguments.config, arguments.overrides))


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    return to_plain(load(arguments.config, arguments.overrides))


JOB = entry.Job(
    name="train",
    summary="Train a network on a manifest; the same name goes on where it stopped.",
    example="cvft train --config town data.manifest=$(ls demo/shards/manifests/*.parquet) train.workers=1 name=mine",
    add_arguments=add_config_arguments,
    run=_run,
    resolve=_resolve,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
