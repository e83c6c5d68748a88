"""A checkpoint becomes a version of a registered model: code, tensors and a card, that load anywhere without a pickle.

Which version is in use, an alias says; `pipeline.tracking.aliases` moves it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

import cvft
from cvft.checkpoint import INFO_FILE, MODEL_FILE, CheckpointInfo, load_model, read_info
from pipeline.tracking.runs import Run

with warnings.catch_warnings():
    # MLflow 3.17 warns, while it is imported, of a type hint in its own code.
    warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType")
    import mlflow.pyfunc

CHECKPOINT_TAG = "checkpoint_sha256"
MODEL_ID_TAG = "logged_model_id"  # MLflow's own field is not kept in a database of ours
CARD_FILE = "MODEL_CARD.md"
SERVING = Path(__file__).with_name("serving.py")
PACKAGES = ("torch", "numpy", "safetensors", "mlflow")


def register_model(
    run: Run,
    checkpoint: Path,
    *,
    name: str = "cvft",
    alias: str | None = "candidate",
    metrics: Mapping[str, float] | None = None,
    description: str = "",
    tags: Mapping[str, str] | None = None,
    card: str = "",
) -> int:
    """Register a checkpoint as a pyfunc model and point an alias at it.

    A checkpoint that is registered already is not registered twice: its version gets the alias.

    Args:
        run: The run that trained it.
        checkpoint: Directory of the checkpoint; its optimizer state stays behind.
        name: Registered model.
        alias: Moved to this version: `mlflow.pyfunc.load_model("models:/<name>@<alias>")`; none moves nothing.
        metrics: Recalls and the like, shown beside the model.
        description: For people.
        tags: Further tags of the version.
        card: The model card, Markdown.

    Returns:
        The version.

    Raises:
        CheckpointError: The checkpoint is missing or damaged.
    """
    info = read_info(checkpoint)
    client = run.client
    digest = checkpoint_sha256(checkpoint)
    version = find_version(client, name, digest)
    if version is None:
        logged = _log_model(run, checkpoint, info=info, name=name, metrics=metrics or {}, card=card)
        own_tags = {
            CHECKPOINT_TAG: digest,
            MODEL_ID_TAG: logged.model_id,
            "manifest_digest": info.manifest_digest or "",
            "step": str(info.step),
        }
        version = _create_version(run, logged, name=name, description=description, tags={**own_tags, **(tags or {})})
    if alias is not None:
        client.set_registered_model_alias(name, alias, str(version))
    return version


def checkpoint_sha256(checkpoint: Path) -> str:
    """Return what identifies a checkpoint: the hash of its JSON, which holds the tensors' own hashes."""
    return hashlib.sha256((checkpoint / INFO_FILE).read_bytes()).hexdigest()


def find_version(client: MlflowClient, name: str, checkpoint_sha256: str) -> int | None:
    """Return the version of a registered model that holds a checkpoint, or none."""
    found = client.search_model_versions(f"name = '{name}' and tags.{CHECKPOINT_TAG} = '{checkpoint_sha256}'")
    return max((int(version.version) for version in found), default=None)


def model_signature(info: CheckpointInfo, descriptor_dim: int) -> ModelSignature:
    """Return two named image batches in, two named descriptor batches out; MLflow checks them at every prediction."""

    def image(name: str, size_px: tuple[int, int]) -> TensorSpec:
        return TensorSpec(np.dtype(np.uint8), (-1, *size_px, 3), name)

    views = ("ground", "aerial")
    sizes = (info.preprocess.ground_size_px, info.preprocess.aerial_size_px)
    outputs = [TensorSpec(np.dtype(np.float32), (-1, descriptor_dim), view) for view in views]
    return ModelSignature(
        inputs=Schema([image(view, size) for view, size in zip(views, sizes, strict=True)]), outputs=Schema(outputs)
    )


def serving_requirements() -> list[str]:
    """Return what a model asks for, as this environment has it: letting MLflow find out by a trial costs seconds."""
    return [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in PACKAGES]


def _log_model(
    run: Run, checkpoint: Path, *, info: CheckpointInfo, name: str, metrics: Mapping[str, float], card: str
) -> LoggedModel:
    """Store the model under the run: serving.py, the `cvft` package, the checkpoint without its optimizer state."""
    client = run.client
    experiment_id = client.get_run(run.run_id).info.experiment_id
    logged = client.create_logged_model(experiment_id, name=name, source_run_id=run.run_id, model_type="pyfunc")
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
                run_id=run.run_id,
            )
            _save(model, checkpoint, info=info, folder=Path(folder))
            (Path(folder) / "model" / CARD_FILE).write_text(card, encoding="utf-8")
            client.log_model_artifacts(logged.model_id, f"{folder}/model")
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.log_outputs(run.run_id, [LoggedModelOutput(logged.model_id, info.step)])
    now = int(time.time() * 1000)
    entries = [
        Metric(key, float(value), now, info.step, model_id=logged.model_id, run_id=run.run_id)
        for key, value in metrics.items()
    ]
    client.log_batch(run.run_id, metrics=entries)
    return client.finalize_logged_model(logged.model_id, "READY")


def _save(model: Model, checkpoint: Path, *, info: CheckpointInfo, folder: Path) -> None:
    slim = folder / "checkpoint"
    slim.mkdir()
    for file in (INFO_FILE, MODEL_FILE):
        shutil.copyfile(checkpoint / file, slim / file)
    network, _ = load_model(slim)  # also holds the tensors against their hash
    with warnings.catch_warnings():
        # An example as JSON would be some megabytes; the signature says what to give.
        warnings.filterwarnings("ignore", message=".*An input example was not provided")
        mlflow.pyfunc.save_model(
            str(folder / "model"),
            mlflow_model=model,
            python_model=str(SERVING),
            artifacts={"checkpoint": str(slim)},
            signature=model_signature(info, network.descriptor_dim),
            code_paths=[str(Path(cvft.__file__).parent)],
            pip_requirements=serving_requirements(),
        )


def _create_version(run: Run, logged: LoggedModel, *, name: str, description: str, tags: Mapping[str, str]) -> int:
    client = run.client
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        name,
        source=logged.artifact_location,  # `models:/<id>` would be looked up at MLflow's global place, not at ours
        run_id=run.run_id,
        tags=dict(tags),
        description=description,
        model_id=logged.model_id,
    )
    # The link back, which MLflow's user interface shows.
    client.set_logged_model_tags(
        logged.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([{"name": name, "version": version.version}])}
    )
    return int(version.version)
