"""From a checkpoint, a run or a name to a version in the registry, with a description and a card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cvft.checkpoint import CheckpointInfo, load_model, read_info
from cvft.errors import CheckpointError, ConfigError
from jobs.run_file import RUN_FILE
from jobs.training.progress import History
from pipeline.cache import default_cache
from pipeline.checkpoints import CheckpointFolder, fetch
from pipeline.model_card import model_card
from pipeline.model_facts import Measurement, Origin, describe
from pipeline.storage import Store
from pipeline.tracking.registry import checkpoint_sha256, register_model
from pipeline.tracking.runs import Run, get_run, open_run, opened
from pipeline.tracking.server import Tracking, prepare, store_errors
from pipeline.tracking.versions import Registry, Version, split_model_uri

CANDIDATE = "candidate"
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_EXPERIMENT = "cvft"


def register_checkpoint(
    run: Run, checkpoint: Path, *, name: str, alias: str = CANDIDATE, data_licence: str = ""
) -> int:
    """Register a checkpoint in full, unless it is registered, and move an alias to its version.

    Args:
        run: The run that trained it.
        checkpoint: Local directory.
        name: Registered model.
        alias: What is moved; `champion` is `promote`'s.
        data_licence: What is known of it, for the card.

    Raises:
        CheckpointError: The checkpoint is damaged.
        StoreError: MLflow cannot take it now.
    """
    registry = Registry(run.uri, name)
    description, card, tags, metrics = "", "", {}, {}
    if registry.holding(checkpoint) is None:
        origin = origin_of(registry, checkpoint, run_id=run.run_id, data_licence=data_licence)
        measurement = _measured_in_training(origin)
        description, card = describe(origin, measurement, None), model_card(name, origin, measurement=measurement)
        tags = {"data_licence": data_licence, "commit": origin.commit or ""}
        metrics = {key: value for key, value in origin.info.metrics.items() if key.startswith(("recall_at_", "chance"))}
    with store_errors(run.uri):
        return register_model(
            run,
            checkpoint,
            name=name,
            alias=alias,
            metrics=metrics,
            description=description,
            card=card,
            tags={key: value for key, value in tags.items() if value},
        )


def origin_of(registry: Registry, checkpoint: Path, *, run_id: str, data_licence: str) -> Origin:
    """Return what is known of a checkpoint's origin, from itself and from its run.

    Raises:
        CheckpointError: It is damaged.
        StoreError: MLflow cannot be asked.
    """
    model, info = load_model(checkpoint)
    facts = registry.run_facts(run_id)
    return Origin(
        info=info,
        descriptor_dim=model.descriptor_dim,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        config=facts.config,
        layout=facts.layout,
        num_pairs=facts.num_pairs,
        commit=facts.commit,
        run_id=run_id,
        data_licence=data_licence,
    )


def find_candidate(registry: Registry, candidate: str, *, data_licence: str = "") -> Version:
    """Return the version that is meant, registering it if it has none yet.

    Args:
        registry: The registered model.
        candidate: A version's number, `models:/name/3` or `models:/name@alias`, the id of a run in MLflow, or the path
            or URI of a checkpoint.
        data_licence: For the card, where a version is made.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
        ConfigError: There is no such version or run.
        StoreError: MLflow or a store cannot be used.
    """
    if candidate.isdecimal() and not _RUN_ID.fullmatch(candidate):
        return registry.version(int(candidate))
    if candidate.startswith("models:"):
        return _named_version(registry, candidate)
    run: Run | None = None
    uri = candidate
    if _RUN_ID.fullmatch(candidate):
        run, uri = _best_of_run(registry, candidate)
    checkpoint = fetch(uri, cache=default_cache().parent)
    known = registry.holding(checkpoint)
    if known is not None:
        return known
    run = run or _run_of_checkpoint(registry, uri, checkpoint)
    return registry.version(register_checkpoint(run, checkpoint, name=registry.name, data_licence=data_licence))


def _named_version(registry: Registry, uri: str) -> Version:
    parts = split_model_uri(uri)
    if parts is None:
        raise ConfigError(f"--candidate {uri}: expected models:/NAME/VERSION or models:/NAME@ALIAS")
    name, number, alias = parts
    if name != registry.name:
        raise ConfigError(f"--candidate {uri}: is of the model {name}; give --name {name} as well")
    if number is not None:
        return registry.version(number)
    found = registry.aliased(alias or "")
    if found is None:
        raise ConfigError(f"--candidate {uri}: no version of {name} has this alias; `cvft models` lists them")
    return found


def _best_of_run(registry: Registry, run_id: str) -> tuple[Run, str]:
    """Return a run and the URI of its best checkpoint."""
    with store_errors(registry.uri):
        run = get_run(Tracking(uri=registry.uri, experiment_id=""), run_id)
    if run is None:
        raise ConfigError(f"--candidate {run_id}: no such run in {registry.uri}")
    config = registry.run_facts(run_id).config
    if "output" not in config or "name" not in config:
        raise ConfigError(f"--candidate {run_id}: this run says nothing of where its checkpoints are; name one by URI")
    folder = CheckpointFolder(f"{config['output'].rstrip('/')}/{config['name']}/checkpoints")
    newest = folder.newest_whole(cache=default_cache().parent)
    if newest is None:
        raise CheckpointError(f"--candidate {run_id}: {folder.uri()} holds no checkpoint")
    best = History(**read_info(newest[1]).training).best
    return run, folder.uri(best or newest[0])


def _run_of_checkpoint(registry: Registry, uri: str, checkpoint: Path) -> Run:
    """Return the run that trained a checkpoint, as its folder says; else one made for it."""
    content = _run_file(uri)
    if content.get("run", {}).get("uri") == registry.uri:
        return opened(Run(**content["run"]))
    tracking = prepare(registry.uri, experiment=_EXPERIMENT)
    identity = checkpoint_sha256(checkpoint)
    run = open_run(tracking, name="imported", identity=identity, config={}, tags={"checkpoint_uri": uri})
    run.finish()
    return run


def _run_file(uri: str) -> dict[str, Any]:
    """Return the file of the run's folder that a checkpoint lies in; empty if it lies elsewhere."""
    folder, _, name = uri.rstrip("/").rpartition("/checkpoints/")
    if not folder or not name:
        return {}
    store = Store.from_uri(folder)
    return dict(json.loads(store.read_bytes(RUN_FILE))) if store.exists(RUN_FILE) else {}


def _measured_in_training(origin: Origin) -> Measurement | None:
    """Return what the training measured at this very step."""
    info: CheckpointInfo = origin.info
    if "recall_at_1" not in info.metrics:
        return None
    return Measurement(
        metrics=info.metrics, split=origin.setting("data.eval_split", "val"), digest=info.manifest_digest or ""
    )
