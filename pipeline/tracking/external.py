"""Every evaluated checkpoint as a model in MLflow that lies elsewhere: where it lies, its recalls, whether it is kept.

MLflow calls it an external model: some rows in its database and a file of a few hundred bytes. What is promoted is
logged in full, see `pipeline.tracking.registry`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.entities import Run as StoredRun
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.models.utils import get_external_mlflow_model_spec
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

from pipeline.tracking.runs import CONTEXT_TAG, Run

NAME_TAG = "checkpoint"
URI_TAG = "checkpoint_uri"
KEPT_TAG = "is_kept"
EVALUATION = "evaluation"


def record_checkpoints(run: Run, *, model: str, checkpoints: Sequence[Mapping[str, Any]], kept: Sequence[str]) -> None:
    """Record checkpoints of a run as external models, each once however often this is called.

    The metrics belong to the run's dataset of the context `evaluation`, and are the ones that the run has at that step.

    Args:
        run: The run.
        model: Beginning of the models' names.
        checkpoints: Of each its `name`, its `uri`, the `step` that it was made after, and its `metrics` by name.
        kept: Names of the run's checkpoints that are there now; the records of others say `is_kept` false.
    """
    client = run.client
    stored = client.get_run(run.run_id)
    known = {found.tags[NAME_TAG]: found for found in _models(client, stored) if NAME_TAG in found.tags}
    for checkpoint in checkpoints:
        name = checkpoint["name"]
        found = known.get(name) or _create(client, stored, model=model, checkpoint=checkpoint, is_kept=name in kept)
        if found.status != LoggedModelStatus.READY:
            _complete(client, stored, found, checkpoint)
    for name, found in known.items():
        if name not in kept and found.tags.get(KEPT_TAG) != "false":
            client.set_logged_model_tags(found.model_id, {KEPT_TAG: "false"})


def _models(client: MlflowClient, stored: StoredRun) -> Iterator[LoggedModel]:
    token = None
    while True:
        page = client.search_logged_models(
            [stored.info.experiment_id], f"source_run_id = '{stored.info.run_id}'", page_token=token
        )
        yield from page
        if not (token := page.token):
            return


def _create(
    client: MlflowClient, stored: StoredRun, *, model: str, checkpoint: Mapping[str, Any], is_kept: bool
) -> LoggedModel:
    return client.create_logged_model(
        stored.info.experiment_id,
        name=f"{model}-{checkpoint['name']}".replace(".", "_"),  # MLflow allows a model's name no dot
        source_run_id=stored.info.run_id,
        model_type="checkpoint",
        params={"step": str(checkpoint["step"])},
        tags={
            MLFLOW_MODEL_IS_EXTERNAL: "true",
            NAME_TAG: checkpoint["name"],
            URI_TAG: checkpoint["uri"],
            KEPT_TAG: "true" if is_kept else "false",
        },
    )


def _complete(client: MlflowClient, stored: StoredRun, model: LoggedModel, checkpoint: Mapping[str, Any]) -> None:
    """Do what belongs to a new model; where a process died on the way, what is missing of it."""
    with tempfile.TemporaryDirectory() as folder:  # without this file it could not be registered
        get_external_mlflow_model_spec(model).save(str(Path(folder) / MLMODEL_FILE_NAME))
        client.log_model_artifacts(model.model_id, folder)
    run_id, step = stored.info.run_id, int(checkpoint["step"])
    if model.model_id not in {output.model_id for output in stored.outputs.model_outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    client.log_batch(run_id, metrics=_metrics(client, stored, model, step=step, values=checkpoint["metrics"]))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _metrics(
    client: MlflowClient, stored: StoredRun, model: LoggedModel, *, step: int, values: Mapping[str, float]
) -> list[Metric]:
    """Return a model's metrics as the run has them, to the millisecond: MLflow logs them to the run as well.

    Equal in all, they are the same metric there, not a second one at that step.
    """
    run_id = stored.info.run_id
    inputs = [(tag, found.dataset) for found in stored.inputs.dataset_inputs for tag in found.tags]
    datasets = {tag.value: dataset for tag, dataset in inputs if tag.key == CONTEXT_TAG}
    dataset, now = datasets.get(EVALUATION), int(time.time() * 1000)
    metrics = []
    for key, value in values.items():
        told = next((metric for metric in client.get_metric_history(run_id, key) if metric.step == step), None)
        metrics.append(
            Metric(
                key,
                float(value) if told is None else told.value,
                now if told is None else told.timestamp,
                step,
                model_id=model.model_id,
                dataset_name=dataset.name if dataset else None,
                dataset_digest=dataset.digest if dataset else None,
                run_id=run_id,
            )
        )
    return metrics
