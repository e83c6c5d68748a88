"""What a training's folder says it holds, so that another training never goes on there by mistake."""

from __future__ import annotations

import json
from typing import Any

from cvft.configuration import dotted_values, to_plain
from cvft.errors import ConfigError
from jobs.config import DataConfig, ExperimentConfig
from jobs.training.saving import checkpoints_of
from pipeline.manifest import Manifest
from pipeline.storage import Store

RUN_FILE = "run.json"
# What may differ when a run is continued: where things lie and what computes. The numbers stay the same to rounding.
FREE_KEYS = (
    "output",
    "data.manifest",
    "data.cache",
    "data.cache_gb",
    "data.keep_pixels",
    "data.num_threads",
    "train.activation_checkpointing",
    "train.checkpoint_every_steps",
    "train.chunk_size",
    "train.compile",
    "train.keep_last",
    "train.store_patience_s",
    "train.workers",
    "train.use_gpu",
    "train.node_labels",
    "train.max_failures",
    "train.collective_timeout_s",
    "train.preemption_check_every_steps",
    "train.resize_after_s",
    "tracking.uri",
    "tracking.log_every_steps",
    "tracking.pictures",
    "tracking.registered_model",
    "tracking.alias",
)


def enter(config: ExperimentConfig, manifest: Manifest, *, remedy: str) -> tuple[dict[str, Any], bool]:
    """Write into a training's folder which training it is, or find that it is this one.

    Args:
        config: The experiment.
        manifest: Its data.
        remedy: What to do where the folder holds another training.

    Returns:
        The file's content, and whether the folder held this training before.

    Raises:
        ConfigError: The folder holds checkpoints of another training; names what differs.
        StoreError: The folder cannot be read or written.
    """
    store = Store.from_uri(config.folder)
    known = json.loads(store.read_bytes(RUN_FILE)) if store.exists(RUN_FILE) else None
    changes = [] if known is None else _changes(config, manifest, known)
    # Without a checkpoint there is nothing yet that another configuration could not go on from.
    if changes and checkpoints_of(config).names():
        raise ConfigError(f"name: run {config.name!r} was begun otherwise: {', '.join(changes)}; {remedy}")
    content: dict[str, Any] = {"manifest_digest": manifest.digest, "config": to_plain(config)}
    if known is not None and not changes and known.get("run"):
        content["run"] = known["run"]
    write(store, content)
    return content, known is not None and not changes


def write(store: Store, content: dict[str, Any]) -> None:
    """Write the file.

    Raises:
        StoreError: The folder cannot be written.
    """
    store.write_bytes(RUN_FILE, json.dumps(content, indent=2).encode())


def _changes(config: ExperimentConfig, manifest: Manifest, known: dict[str, Any]) -> list[str]:
    """Name what makes this another training than the one that the run's folder holds."""
    # A key that the release which wrote the file did not have stood at its default.
    defaults = dotted_values(to_plain(ExperimentConfig(name="any", data=DataConfig(manifest="any"))))
    then, now = defaults | dotted_values(known["config"]), dotted_values(to_plain(config))
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    changed = [f"{key}={now.get(key)!r} (was {then.get(key)!r})" for key in changed if not _is_free(key)]
    if known["manifest_digest"] != manifest.digest:
        changed.append(f"manifest {manifest.digest[:16]} (was {known['manifest_digest'][:16]})")
    return changed


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
