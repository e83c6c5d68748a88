"""A real MLflow server, on PostgreSQL and Ceph, started by our script: what it took is there after it was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from mlflow.exceptions import MlflowException

from pipeline.tracking.external import record_checkpoints
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.runs import Run, open_run
from pipeline.tracking.server import is_refusal, prepare
from tests.mlflow_stack import MlflowStack

pytestmark = pytest.mark.objectstore


@pytest.fixture(scope="module")
def server(radosgw: dict[str, str]) -> Iterator[MlflowStack]:
    """The server, its artifacts in the session's object store."""
    with tempfile.TemporaryDirectory(prefix="cvft-mlflow-") as folder:
        server = MlflowStack(Path(folder), environment=radosgw)
        if reason := server.reason_to_skip():
            pytest.skip(reason)
        try:
            yield server
        finally:
            server("stop")


def end_postgresql(server: MlflowStack) -> None:
    """End the database under the server's feet; `start` starts it again."""
    pid = int((server.folder / "postgres/data/postmaster.pid").read_text().split()[0])
    os.kill(pid, signal.SIGINT)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.05)


def history(run: Run, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in run.client.get_metric_history(run.run_id, name)]


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """While something is away, this process asks once and waits 3 s.

    Of the server's processes one that did not know its database before waits for it, and holds the client meanwhile.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
        yield


def test_what_the_server_took_is_there_after_it_was_killed_and_started_again(server, tmp_path, monkeypatch, caplog):
    found = server("start")
    tracking = prepare(found["MLFLOW_TRACKING_URI"], experiment="town")
    parent = open_run(tracking, name="search", identity="search", config={"trials": 1})
    run = open_run(tracking, name="trial", identity="trial", config={"seed": 1}, parent=parent)
    for name, context in (("train", "training"), ("val", "evaluation")):
        run.log_dataset(name=f"town {name}", digest="d" * 64, source="s3://b/manifest", context=context)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(b"png")
    checkpoint = {"name": "step-00000010", "uri": "s3://b/step-00000010", "step": 10, "metrics": {"recall_at_1": 0.5}}
    quick = {"cache": tmp_path, "interval_s": 0.1, "retry_s": (0.1, 0.5)}
    with Outbox(run, str(tmp_path), **quick) as outbox:
        outbox.log_metrics({"train/loss": 2.0, "recall_at_1": 0.5}, step=10)
        outbox.defer(record_checkpoints, model="trial", checkpoints=[checkpoint], kept=["step-00000010"])
        outbox.defer(Run.log_folder, source=str(tmp_path / "pictures"), artifact_path="pictures")
    server("kill")
    with impatient():
        with pytest.raises(MlflowException) as away:
            run.client.get_run(run.run_id)
        assert not is_refusal(away.value)
        with Outbox(run, str(tmp_path), **quick) as outbox:
            outbox.log_metrics({"train/loss": 1.0}, step=20)
            outbox.defer(record_checkpoints, model="trial", checkpoints=[checkpoint], kept=[])
    assert "is away" in caplog.text

    assert server("start") == found
    end_postgresql(server)
    # The server may store what a client has given up on, later: nothing that is looked at below.
    for call in (lambda: run.client.get_run(run.run_id), lambda: run.log_metrics({"late": 1.0}, step=20)):
        with impatient(), pytest.raises(MlflowException) as away:
            call()
        assert not is_refusal(away.value)
    assert server("start") == found
    with Outbox(run, str(tmp_path), **quick) as outbox:
        outbox.defer(Run.finish)
    assert any(Outbox(run, str(tmp_path), **quick).close() == 0 for _ in range(20))
    stored = run.client.get_run(run.run_id)
    assert (stored.info.status, stored.data.params["seed"]) == ("FINISHED", "1")
    assert stored.data.tags["mlflow.parentRunId"] == parent.run_id
    assert history(run, "train/loss") == [(10, 2.0), (20, 1.0)]
    assert history(run, "recall_at_1") == [(10, 0.5)]
    (model,) = run.client.search_logged_models([tracking.experiment_id], f"source_run_id = '{run.run_id}'")
    assert (model.tags["is_kept"], model.status.value) == ("false", "READY")
    assert [(metric.key, metric.value, metric.dataset_name) for metric in model.metrics] == [
        ("recall_at_1", 0.5, "town val")
    ]
    run.client.create_registered_model("cvft")
    version = run.client.create_model_version("cvft", model.artifact_location, run.run_id, model_id=model.model_id)
    assert (int(version.version), version.status) == (1, "READY")
    _check_artifacts(run, found, monkeypatch)


def _check_artifacts(run: Run, found: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture is in the bucket, and a client without any key of the store gets it from the server."""
    bucket = boto3.session.Session(found["AWS_ACCESS_KEY_ID"], found["AWS_SECRET_ACCESS_KEY"]).client(
        "s3", endpoint_url=found["AWS_ENDPOINT_URL"], region_name=found["AWS_REGION"]
    )
    keys = [item["Key"] for item in bucket.list_objects_v2(Bucket="mlflow")["Contents"]]
    (key,) = [key for key in keys if key.endswith("pictures/a.png")]
    assert bucket.get_object(Bucket="mlflow", Key=key)["Body"].read() == b"png"
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    assert Path(run.client.download_artifacts(run.run_id, "pictures/a.png")).read_bytes() == b"png"
