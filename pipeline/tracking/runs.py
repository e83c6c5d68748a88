"""Runs in MLflow: one for each training, continued when the training is.

A `Run` is a few strings, so that it travels to Ray workers; only rank 0 should log. Its calls wait for MLflow: a
training gives them to an `Outbox`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from cvft.configuration import dotted_values
from cvft.errors import StoreError
from pipeline.storage import Store
from pipeline.tracking.server import Tracking, is_refusal, prepare, store_errors, tracking_client

T = TypeVar("T")
Status = Literal["FINISHED", "FAILED", "KILLED"]

IDENTITY_TAG = "cvft.identity_sha256"
CONTEXT_TAG = "mlflow.data.context"
COMMIT_TAG = "mlflow.source.git.commit"
MAX_PARAMS = 100  # per request
MAX_METRICS = 1000  # per request
MAX_PARAM_CHARACTERS = 6000
MAX_DIGEST_CHARACTERS = 36


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run in MLflow, or one that will be: without an id it says what is needed to start it, see `opened`.

    Attributes:
        uri: Where it is kept.
        run_id: Its identity there; empty if MLflow was away when it began.
        experiment: Of a run without an id, the experiment's name.
        name: Of a run without an id, its name in the user interface.
        identity: Of a run without an id, what makes two starts of it one.
        parent_id: Of a run without an id, the run that it is shown below; empty for none.
    """

    uri: str
    run_id: str = ""
    experiment: str = ""
    name: str = ""
    identity: str = ""
    parent_id: str = ""

    @property
    def key(self) -> str:
        """A name that stays the same for as long as the run goes on, fit for a file."""
        return self.run_id or _hash(self.identity)

    @property
    def client(self) -> MlflowClient:
        """The process's MLflow client of this place."""
        return tracking_client(self.uri)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log numbers by name at a step, in as few requests as MLflow allows."""
        now = int(time.time() * 1000)
        self.log_batches(Metric(name, float(value), now, step) for name, value in metrics.items())

    def log_batches(self, metrics: Iterable[Metric]) -> None:
        """Log metrics of several steps, in as few requests as MLflow allows."""
        for batch in _batches(metrics, MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=batch)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log a resolved configuration as parameters with dotted names and, in full, as `config.json`.

        MLflow never changes a parameter. Where a continued run differs from its beginning, the parameter keeps the
        first value, a tag `changed.<name>` tells both, and `config.json` is the newest.
        """
        values = {name: str(value)[:MAX_PARAM_CHARACTERS] for name, value in dotted_values(config).items()}
        before = self.client.get_run(self.run_id).data.params
        for batch in _batches((Param(*item) for item in values.items() if item[0] not in before), MAX_PARAMS):
            self.client.log_batch(self.run_id, params=batch)
        changed = {name: value for name, value in values.items() if before.get(name, value) != value}
        self.set_tags({f"changed.{name}": f"{before[name]} -> {value}" for name, value in changed.items()})
        self.client.log_text(self.run_id, json.dumps(config, indent=2, ensure_ascii=False) + "\n", "config.json")

    def log_dataset(
        self, *, name: str, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Record a dataset as an input of the run.

        Args:
            name: Its name in the user interface.
            digest: Digest of the manifest; MLflow holds 36 characters of it, the profile the whole.
            source: URI of the manifest.
            context: What it was used for (`training`, `evaluation`).
            profile: Further facts, such as the number of pairs.
        """
        scheme, separator, _ = source.partition("://")
        dataset = Dataset(
            name=name,
            digest=digest[:MAX_DIGEST_CHARACTERS],
            source_type=scheme if separator and scheme != "file" else "local",
            source=json.dumps({"uri": source}),
            profile=json.dumps({**(profile or {}), "manifest_digest": digest}),
        )
        tags = [InputTag(CONTEXT_TAG, context)]
        self.client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, tags)])

    def log_artifacts(self, paths: Iterable[Path], *, artifact_path: str | None = None) -> None:
        """Copy files into the run's artifacts, below `artifact_path`."""
        for path in paths:
            self.client.log_artifact(self.run_id, str(path), artifact_path)

    def log_folder(self, source: str, artifact_path: str) -> None:
        """Copy all files below a folder into the run's artifacts, below `artifact_path`.

        Args:
            source: URI of the folder, as `Store` takes it. Where the call waits in a spool it is read only when MLflow
                takes it, so that it must stay: a folder beside the run's checkpoints does.
            artifact_path: Folder among the artifacts.

        Raises:
            StoreError: There is no file below it, or it cannot be read.
        """
        store = Store.from_uri(source)
        paths = store.list()
        if not paths:
            raise StoreError(f"{store.uri()}: holds no file to log as an artifact")
        with tempfile.TemporaryDirectory() as temporary:
            folder = store.local_path("") or Path(temporary)
            if folder == Path(temporary):
                for path in paths:
                    copy = folder / path
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    with store.open_input(path) as stream, copy.open("wb") as file:
                        shutil.copyfileobj(stream, file, 1 << 20)
            self.client.log_artifacts(self.run_id, str(folder), artifact_path)

    def log_text(self, text: str, artifact_file: str) -> None:
        """Write a text file into the run's artifacts."""
        self.client.log_text(self.run_id, text, artifact_file)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; an older value of the same name is replaced."""
        for batch in _batches((RunTag(*item) for item in tags.items()), MAX_PARAMS):
            self.client.log_batch(self.run_id, tags=batch)

    def resume(self) -> None:
        """Open a closed run again."""
        self.client.update_run(self.run_id, status="RUNNING")

    def finish(self, status: Status = "FINISHED", end_time_ms: int | None = None) -> None:
        """Close the run, as of now or of a time in milliseconds since 1970; `resume` opens it again."""
        self.client.set_terminated(self.run_id, status, end_time_ms)


def open_run(
    tracking: Tracking,
    *,
    name: str,
    identity: str,
    config: Mapping[str, Any],
    commit: str | None = None,
    tags: Mapping[str, str] | None = None,
    parent: Run | None = None,
) -> Run:
    """Continue the run of this identity, or start it.

    Args:
        tracking: From `prepare`.
        name: Name shown in the user interface.
        identity: What makes two starts the same training (such as its output folder); runs of one identity are one run.
        config: The resolved configuration, see `Run.log_config`.
        commit: Commit of the code.
        tags: Further tags.
        parent: The run that a new one is shown below; one that is continued keeps its own.

    Raises:
        StoreError: MLflow cannot use the place.
    """
    with store_errors(tracking.uri):
        run = find_run(tracking, identity=identity)
        if run is None:
            run = create_run(tracking, name=name, identity=identity, parent=parent)
        else:
            run.resume()
        run.log_config(config)
        run.set_tags({**({COMMIT_TAG: commit} if commit else {}), **(tags or {})})
    return run


def create_run(tracking: Tracking, *, name: str, identity: str, parent: Run | None = None) -> Run:
    """Start a run, see `open_run`."""
    tags = {IDENTITY_TAG: _hash(identity), **({MLFLOW_PARENT_RUN_ID: parent.run_id} if parent else {})}
    created = tracking_client(tracking.uri).create_run(tracking.experiment_id, run_name=name, tags=tags)
    return Run(uri=tracking.uri, run_id=created.info.run_id)


def opened(run: Run) -> Run:
    """Return the run with its id in MLflow; one that has none yet is found by its identity, or started.

    Raises:
        StoreError: MLflow cannot be used.
    """
    if run.run_id:
        return run
    tracking = prepare(run.uri, experiment=run.experiment)
    parent = Run(uri=run.uri, run_id=run.parent_id) if run.parent_id else None
    with store_errors(run.uri):
        found = find_run(tracking, identity=run.identity)
        return found or create_run(tracking, name=run.name, identity=run.identity, parent=parent)


def get_run(tracking: Tracking, run_id: str) -> Run | None:
    """Return a run by its id, or none where it is unknown or deleted."""
    try:
        found = tracking_client(tracking.uri).get_run(run_id)
    except MlflowException as error:
        if is_refusal(error):
            return None
        raise
    return Run(uri=tracking.uri, run_id=run_id) if found.info.lifecycle_stage == "active" else None


def find_run(tracking: Tracking, *, identity: str) -> Run | None:
    """Return the run of an identity, the newest if there are several, or none."""
    runs = tracking_client(tracking.uri).search_runs(
        [tracking.experiment_id], f"tags.`{IDENTITY_TAG}` = '{_hash(identity)}'", max_results=1
    )
    return Run(uri=tracking.uri, run_id=runs[0].info.run_id) if runs else None


def _hash(identity: str) -> str:
    """Hide quotation marks, for which MLflow's filters have no escape."""
    return hashlib.sha256(identity.encode()).hexdigest()


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    everything = list(items)
    for start in range(0, len(everything), size):
        yield everything[start : start + size]
