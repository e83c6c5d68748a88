"""Where MLflow keeps things: an sqlite file made ready once, or a server.

No global state of MLflow is used: every call names the place by its URI, so that any process, a Ray worker too,
can make it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow.telemetry
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from cvft.errors import StoreError, StoreUnavailableError

SQLITE = "sqlite:///"
# What is raised where a place cannot be used: by MLflow, and by a store whose files are to go there.
STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError, StoreError)
# Answers that stay the same however often one asks; a proxy in front of an absent server gives none of them.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
# The client's own requests; what the environment says comes first. MLflow would try an absent server for minutes.
_CLIENT_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # after 0 and 4 seconds
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",  # drawn from Python's global generator, which belongs to the training
}


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """A place for runs and models, ready for use from any process.

    Attributes:
        uri: Tracking and registry URI; sqlite paths are absolute.
        experiment_id: The experiment that new runs belong to.
    """

    uri: str
    experiment_id: str


def prepare(uri: str, *, experiment: str) -> Tracking:
    """Make the place and the experiment where they are missing; call it once, in the driver, before any worker logs.

    Several processes that create the schema of one sqlite file at once fail. Artifacts of an sqlite file lie beside it
    in `mlruns/`; a server chooses their place itself.

    Args:
        uri: `sqlite:///path/mlflow.db` (relative to the working directory; four slashes for an absolute path) or a
            server's URL.
        experiment: Name of the experiment.

    Raises:
        StoreUnavailableError: MLflow does not answer, or not now.
        StoreError: MLflow cannot use this place.
    """
    uri, artifacts = resolve(uri)
    with store_errors(uri):
        client = tracking_client(uri)
        found = client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else _create_experiment(client, experiment, artifacts)
    if found and found.lifecycle_stage != "active":
        raise StoreError(f"tracking.experiment: {experiment!r} was deleted in {uri}; restore it or name another")
    return Tracking(uri=uri, experiment_id=experiment_id)


def _create_experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    try:
        return str(client.create_experiment(name, artifacts))
    except MlflowException as error:
        found = client.get_experiment_by_name(name) if error.error_code == "RESOURCE_ALREADY_EXISTS" else None
        if found is None:
            raise
        return str(found.experiment_id)  # another process made it meanwhile


@contextlib.contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow raises where a place cannot be used into a StoreError of one line."""
    try:
        yield
    except STORE_ERRORS as error:
        kind = StoreError if is_refusal(error) else StoreUnavailableError
        raise kind(
            f"tracking.uri={uri}: MLflow cannot use it: {reason_of(error)}; give {SQLITE}FILE or a server"
        ) from error


def is_refusal(error: Exception) -> bool:
    """Tell whether MLflow, or a store whose files it was to take, answered no and would do so again."""
    if isinstance(error, StoreError):
        return not isinstance(error, StoreUnavailableError)
    return isinstance(error, MlflowException) and error.error_code in _REFUSALS


def reason_of(error: Exception) -> str:
    """Return an error of MLflow in one short line: its beginning says what failed, its end why."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"


@functools.cache
def tracking_client(uri: str) -> MlflowClient:
    """Return this process's client of a place; telemetry and bars are off unless the environment says otherwise."""
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    mlflow.telemetry.set_telemetry_client()
    # Thirty lines of schema migrations at every new file tell a user nothing.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def resolve(uri: str) -> tuple[str, str | None]:
    """Make an sqlite path absolute, since workers run elsewhere; return also where its artifacts go."""
    if not uri.startswith(SQLITE):
        return uri, None
    path = Path(uri.removeprefix(SQLITE)).expanduser().resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"tracking.uri={uri}: cannot make the folder {path.parent}: {error.strerror}") from error
    return f"{SQLITE}{path}", (path.parent / "mlruns").as_uri()
