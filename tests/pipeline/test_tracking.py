import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

from cvft.errors import StoreError, StoreUnavailableError
from pipeline.storage import Store
from pipeline.tracking.environment import environment_text
from pipeline.tracking.runs import Run, find_run, open_run
from pipeline.tracking.server import prepare, tracking_client

# MLflow 3.17 uses an option that SQLAlchemy 2.1 wants to drop; it is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

CONFIG = {"name": "a", "train": {"loss": {"gamma": 10.0}, "sizes": [1, 2]}, "many": {f"k{i}": i for i in range(230)}}


@pytest.fixture(scope="module")
def tracking(tmp_path_factory, mlflow_schema):
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    shutil.copyfile(mlflow_schema, file)
    # Three slashes and an absolute path: the usual slip; it must still mean that file.
    return prepare(f"sqlite:///{file}", experiment="town")


def client(tracking):
    return MlflowClient(tracking.uri, tracking.uri)


def test_preparing_twice_gives_the_same_experiment(tracking):
    assert prepare(tracking.uri, experiment="town") == tracking
    assert prepare(tracking.uri, experiment="other").experiment_id != tracking.experiment_id


def test_relative_sqlite_paths_become_absolute_and_artifacts_lie_beside(tmp_path, monkeypatch, tracking):
    (tmp_path / "here").mkdir()
    shutil.copyfile(tracking.uri.removeprefix("sqlite:///"), tmp_path / "here/mlflow.db")  # spares making a schema
    monkeypatch.chdir(tmp_path)
    place = prepare("sqlite:///here/mlflow.db", experiment="relative")
    assert place.uri == f"sqlite:///{tmp_path}/here/mlflow.db"
    run = open_run(place, name="a", identity="a", config={"a": 1})
    assert (tmp_path / f"here/mlruns/{run.run_id}/artifacts/config.json").exists()


def test_a_place_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="cannot make the folder") as caught:
        prepare(f"sqlite:///{tmp_path}/file/mlflow.db", experiment="town")
    assert "\n" not in str(caught.value)
    (tmp_path / "text.db").write_text("not a database" * 100)
    with pytest.raises(StoreError, match="MLflow cannot use it") as caught:
        prepare(f"sqlite:///{tmp_path}/text.db", experiment="town")
    assert "\n" not in str(caught.value)


def test_a_run_holds_its_configuration_metrics_dataset_and_files(tracking, tmp_path):
    run = open_run(tracking, name="first", identity="first", config=CONFIG, commit="abc", tags={"host": "h"})
    run.log_metrics({"loss": 2.0, "recall_at_1": 0.25}, step=1)
    run.log_metrics({f"m{i}": i for i in range(1100)}, step=2)
    run.log_dataset(name="town", digest="d" * 64, source="s3://b/manifest", context="training", profile={"pairs": 5})
    (tmp_path / "a.png").write_bytes(b"png")
    run.log_artifacts([tmp_path / "a.png"], artifact_path="report")
    run.finish()

    stored = client(tracking).get_run(run.run_id)
    assert stored.info.run_name == "first"
    assert stored.info.status == "FINISHED"
    assert stored.data.params["train.loss.gamma"] == "10.0"
    assert len(stored.data.params) == 233
    assert stored.data.metrics["recall_at_1"] == 0.25
    assert stored.data.metrics["m1099"] == 1099
    assert stored.data.tags["mlflow.source.git.commit"] == "abc"
    (dataset,) = stored.inputs.dataset_inputs
    assert dataset.dataset.source_type == "s3"
    assert json.loads(dataset.dataset.profile) == {"pairs": 5, "manifest_digest": "d" * 64}
    paths = [item.path for item in client(tracking).list_artifacts(run.run_id, "report")]
    assert paths == ["report/a.png"]


def test_a_second_start_of_the_same_training_continues_its_run_and_tells_what_changed(tracking):
    first = open_run(tracking, name="again", identity="it's", config={"epochs": 5, "seed": 1})
    first.finish("FAILED")
    second = open_run(tracking, name="again", identity="it's", config={"epochs": 10, "seed": 1, "new": 2})
    assert second == first == find_run(tracking, identity="it's")
    stored = client(tracking).get_run(first.run_id)
    assert stored.info.status == "RUNNING"
    assert stored.data.params == {"epochs": "5", "seed": "1", "new": "2"}
    assert {key: value for key, value in stored.data.tags.items() if key.startswith("changed")} == {
        "changed.epochs": "5 -> 10"
    }
    assert find_run(tracking, identity="another") is None


def test_another_process_logs_with_uri_and_run_id_alone(tracking):
    run = open_run(tracking, name="worker", identity="worker", config={})
    code = f"""
from pipeline.tracking.runs import Run
Run(uri={run.uri!r}, run_id={run.run_id!r}).log_metrics({{"loss": 3}}, step=7)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    (metric,) = Run(uri=run.uri, run_id=run.run_id).client.get_metric_history(run.run_id, "loss")
    assert (metric.value, metric.step) == (3.0, 7)


def test_a_deleted_experiment_and_an_absent_server_are_one_line_each(tmp_path, monkeypatch, mlflow_schema):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    shutil.copyfile(mlflow_schema, tmp_path / "mlflow.db")
    tracking = prepare(uri, experiment="old")
    tracking_client(tracking.uri).delete_experiment(tracking.experiment_id)
    with pytest.raises(
        StoreError, match=r"tracking.experiment: 'old' was deleted in sqlite.*restore it or name another"
    ):
        prepare(uri, experiment="old")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StoreUnavailableError, match=r"MLflow cannot use it: .*Connection refused.*; give"):
        prepare("http://127.0.0.1:9", experiment="old")


def test_an_environment_is_told_in_the_same_words_every_time():
    text = environment_text(commit="abc")
    assert text == environment_text(commit="abc")
    facts, packages = ([line for line in text.splitlines() if line.startswith("#") == is_fact] for is_fact in (1, 0))
    assert facts[0] == "# commit: abc"
    assert any(torch.__version__ in line for line in facts)
    names = [package.split("==")[0] for package in packages]
    assert names == sorted(set(names))
    assert {"mlflow", "ray", "torch"} <= set(names)


def test_a_run_is_shown_below_its_parent_and_keeps_it_when_it_goes_on(tracking):
    search, other = (open_run(tracking, name=name, identity=name, config={}) for name in ("search", "other search"))
    trial = open_run(tracking, name="trial", identity="trial", config={}, parent=search)
    assert open_run(tracking, name="trial", identity="trial", config={}, parent=other) == trial
    children = client(tracking).search_runs([tracking.experiment_id], f"tags.`mlflow.parentRunId` = '{search.run_id}'")
    assert [child.info.run_id for child in children] == [trial.run_id]
    assert "mlflow.parentRunId" not in client(tracking).get_run(search.run_id).data.tags


def _folder_with_pictures(store):
    store.write_bytes("a.png", b"one")
    store.write_bytes("below/b.png", b"two")
    return store.uri()


def _artifacts(run, path):
    client_, found = run.client, {}
    for item in client_.list_artifacts(run.run_id, path):
        if item.is_dir:
            found |= _artifacts(run, item.path)
        else:
            found[item.path] = Path(client_.download_artifacts(run.run_id, item.path)).read_bytes()
    return found


@pytest.mark.parametrize("place", ["local", pytest.param("s3", marks=pytest.mark.objectstore)])
def test_a_folder_of_any_store_becomes_artifacts(tracking, tmp_path, place, request):
    folder = request.getfixturevalue("s3_uri") if place == "s3" else tmp_path / "pictures"
    run = open_run(tracking, name="pictures", identity=f"pictures {place}", config={})
    run.log_folder(source=_folder_with_pictures(Store.from_uri(folder)), artifact_path="report")
    assert _artifacts(run, "report") == {"report/a.png": b"one", "report/below/b.png": b"two"}
    with pytest.raises(StoreError, match="holds no file to log"):
        run.log_folder(source=f"{folder}/nothing", artifact_path="report")
