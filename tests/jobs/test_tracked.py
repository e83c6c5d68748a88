import json
import random
import shutil
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from cvft.checkpoint import read_state
from cvft.engine import StepReport
from cvft.errors import StoreError
from jobs import tracked, train
from jobs.resources import Machine, memory_metrics, memory_text
from jobs.tracked import StepMetrics
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.runs import Run, create_run
from pipeline.tracking.server import prepare
from tests.mlflow_server import MlflowServer

NOBODY = "http://127.0.0.1:9"


def _run(config, result):
    return Run(uri=config.tracking.uri, run_id=result["run_id"])


def _history(run, name):
    return [(metric.step, metric.value) for metric in run.client.get_metric_history(run.run_id, name)]


def _losses(result):
    """The loss of every step, as the newest checkpoint has it."""
    newest = sorted(Path(result["checkpoint"]).parent.iterdir())[-1]
    return read_state(newest, "curve").tensors["losses"].tolist()


def _means(losses, every):
    """Mean loss by the number of steps done, the last interval being shorter."""
    ends = [*range(every, len(losses), every), len(losses)]
    return {end: sum(losses[start:end]) / (end - start) for start, end in zip([0, *ends], ends, strict=False)}


def test_the_numbers_of_steps_are_in_mlflow_as_means_over_intervals(tiny):
    config = tiny("train.num_epochs=3", "tracking.log_every_steps=2")
    result = train.train(config)
    run = _run(config, result)
    losses = _losses(result)
    assert dict(_history(run, "train/loss")) == pytest.approx(_means(losses, 2))
    metrics = run.client.get_run(run.run_id).data.metrics
    assert metrics["train/learning_rate"] >= 0
    assert metrics["train/gradient_norm"] > 0
    assert metrics["train/pairs_per_s"] > 0
    assert 0 <= metrics["train/data_wait_share"] < 1
    assert 0 < metrics["train/step_s"] < 60
    assert 1e8 < metrics["system/rss_bytes"] < 1e11
    assert metrics["system/system_memory_usage_megabytes"] < psutil.virtual_memory().total / 1e6
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert len(_history(run, "system/disk_available_megabytes")) >= 1
    files = {file.path for file in run.client.list_artifacts(run.run_id)}
    assert {"config.json", "environment.txt"} <= files


def test_every_evaluation_is_a_model_in_mlflow_that_knows_whether_its_checkpoint_is_there(tiny):
    config = tiny("train.num_epochs=5", "train.keep_last=1", "train.checkpoint_every_steps=3")
    result = train.train(config)
    run = _run(config, result)
    folder = Path(result["checkpoint"]).parent
    epochs = json.loads((sorted(folder.iterdir())[-1] / "checkpoint.json").read_text())["training"]["epochs"]
    experiment = run.client.get_run(run.run_id).info.experiment_id
    models = run.client.search_logged_models([experiment], f"source_run_id = '{run.run_id}'")
    recalls = {
        model.tags["checkpoint_uri"]: {metric.key: metric.value for metric in model.metrics}["recall_at_1"]
        for model in models
    }
    assert recalls == {str(folder / f"step-{epoch['step']:08d}"): epoch["recall_at_1"] for epoch in epochs}
    assert {model.tags["checkpoint_uri"] for model in models if model.tags["is_kept"] == "true"} == {
        str(path) for path in folder.iterdir()
    }
    assert _history(run, "recall_at_1") == [(epoch["step"], epoch["recall_at_1"]) for epoch in epochs]
    inputs = run.client.get_run(run.run_id).inputs.dataset_inputs
    assert {found.tags[0].value: json.loads(found.dataset.profile)["split"] for found in inputs} == {
        "training": "train",
        "evaluation": "val",
    }


def test_speed_and_waiting_are_those_of_the_whole_interval():
    logged = []
    metrics = StepMetrics(lambda values, step: logged.append((step, values)), every=2, device=torch.device("cpu"))
    for step, (wait_s, step_s) in enumerate([(3.0, 1.0), (0.0, 4.0), (1.0, 1.0)]):
        speed = 8 / (wait_s + step_s)
        report = {"loss": step, "gradient_norm": 1.0, "learning_rate": 0.1 * step, "pairs_per_s": speed}
        metrics.add(StepReport(step=step, data_wait_s=wait_s, step_s=step_s, **report))
    metrics.flush()
    metrics.flush()
    assert [step for step, _ in logged] == [2, 3]
    first = logged[0][1]
    assert (first["train/loss"], first["train/learning_rate"], first["train/step_s"]) == (0.5, 0.1, 2.5)
    assert first["train/pairs_per_s"] == pytest.approx(16 / 8)
    assert first["train/data_wait_share"] == pytest.approx(3 / 8)


def test_the_machine_is_read_at_most_so_often_and_draws_nothing_from_the_trainings_generators():
    machine = Machine(torch.device("cpu"), every_s=3600.0)
    states = random.getstate(), torch.get_rng_state()
    first = machine.metrics()
    assert {f"system/{name}" for name in ("cpu_utilization_percentage", "network_receive_megabytes")} <= first.keys()
    assert 0 < first["system/system_memory_usage_percentage"] < 100
    assert machine.metrics() == {}
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_a_training_cut_between_checkpoints_and_continued_has_every_step_once(tiny, monkeypatch):
    config = tiny("train.num_epochs=3", "tracking.log_every_steps=1")

    class PowerCut(Exception):
        pass

    record = train.tracked.Recorder.on_step

    def cut(self, report):
        record(self, report)
        if report.step == 4:
            raise PowerCut

    monkeypatch.setattr(train.tracked.Recorder, "on_step", cut)
    with pytest.raises(PowerCut):
        train.train(config)
    monkeypatch.undo()
    result = train.train(config)
    history = _history(_run(config, result), "train/loss")
    assert history == list(enumerate(_losses(result), 1))
    assert len(history) > 5


def test_what_waits_in_a_folder_is_delivered_without_a_training(tiny, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = tiny()
    run = create_run(prepare(config.tracking.uri, experiment="cvft"), name="left", identity=config.folder)
    with tracked.outbox_of(config, replace(run, uri=NOBODY)) as outbox:
        outbox.log_metrics({"loss": 1.0}, step=1)
    assert _history(run, "loss") == []
    assert tracked.deliver(config, replace(run, uri=NOBODY)) == 1
    assert tracked.deliver(config, run) == 0
    assert _history(run, "loss") == [(1, 1.0)]


def test_a_folder_begun_anew_has_a_new_run(tiny, tmp_path):
    config = tiny("train.num_epochs=1")
    first = train.train(config)
    assert train.train(config)["run_id"] == first["run_id"]
    shutil.rmtree(tmp_path / "runs")
    assert train.train(config)["run_id"] != first["run_id"]


def test_a_training_does_not_begin_where_mlflows_file_cannot_be_used(tiny, tmp_path):
    (tmp_path / "text.db").write_text("not a database" * 100)
    with pytest.raises(StoreError, match=r"tracking.uri=sqlite.*: MLflow cannot use it"):
        train.train(tiny("train.num_epochs=1", f"tracking.uri=sqlite:///{tmp_path}/text.db"))


@pytest.mark.slow
def test_begun_without_a_server_by_a_wrong_address_a_training_is_told_whole_to_the_right_one(
    tiny, mlflow_schema, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "mlflow").mkdir()
    database = shutil.copyfile(mlflow_schema, tmp_path / "mlflow/mlflow.db")
    parent = create_run(prepare(f"sqlite:///{database}", experiment="cvft"), name="search", identity="search")
    settings = ["tracking.log_every_steps=1", "train.num_epochs=2"]
    with monkeypatch.context() as patch:
        patch.setattr(train.tracked, "open_run", partial(train.tracked.open_run, parent=parent))
        away = train.train(tiny(f"tracking.uri={NOBODY}", *settings))
    assert (away["run_id"], away["epochs_done"]) == ("", 2)
    assert "goes on all the same" in caplog.text
    server = MlflowServer(database)
    server.start()
    server.wait()
    try:
        config = tiny(f"tracking.uri={server.uri}", *settings)
        result = train.train(config)
        assert {**away, "run_id": result["run_id"]} == result
        assert train.train(config) == result
        run = _run(config, result)
        assert _history(run, "train/loss") == list(enumerate(_losses(result), 1))
        stored = run.client.get_run(run.run_id)
        assert (stored.info.status, stored.info.run_name) == ("FINISHED", "town")
        assert stored.data.tags["mlflow.parentRunId"] == parent.run_id
        assert len(stored.outputs.model_outputs) == 2
        assert len(run.client.search_runs([stored.info.experiment_id])) == 2
    finally:
        server.kill()


@pytest.mark.slow
def test_mlflow_killed_in_the_middle_away_at_the_next_start_and_back_has_every_number_once(
    tiny, mlflow_schema, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "mlflow").mkdir()
    server = MlflowServer(shutil.copyfile(mlflow_schema, tmp_path / "mlflow/mlflow.db"))
    server.start()
    quick = partial(Outbox, interval_s=0.05, retry_s=(0.05, 0.2))
    monkeypatch.setattr(train.tracked, "Outbox", quick)
    settings = [f"tracking.uri={server.uri}", "tracking.log_every_steps=1", "train.num_epochs=6"]
    config = tiny(*settings)
    checkpoints = tmp_path / "runs/town/checkpoints"

    def kill_after_the_first_checkpoint():
        while not any(checkpoints.glob("*/checkpoint.json")):
            time.sleep(0.01)
        server.kill()

    server.wait()
    killer = threading.Thread(target=kill_after_the_first_checkpoint)
    killer.start()
    try:
        result = train.train(config)
        killer.join()
        assert (result["epochs_done"], "wait in" in caplog.text) == (6, True)
        assert train.train(config) == result  # nothing to train, MLflow still away
        assert "goes on all the same" in caplog.text
        server.start()
        server.wait()
        caplog.clear()
        assert train.train(config) == result
        assert "wait in" not in caplog.text
        run = _run(config, result)
        assert _history(run, "train/loss") == list(enumerate(_losses(result), 1))
        newest = sorted(checkpoints.iterdir())[-1]
        epochs = json.loads((newest / "checkpoint.json").read_text())["training"]["epochs"]
        assert _history(run, "recall_at_1") == [(epoch["step"], epoch["recall_at_1"]) for epoch in epochs]
        assert run.client.get_run(run.run_id).info.status == "FINISHED"
    finally:
        killer.join()
        server.kill()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpus_memory_and_time_are_read():
    device = torch.device("cuda")
    tensor = torch.ones(1 << 28, device=device)
    metrics = memory_metrics(device)
    assert metrics["system/cuda_reserved_bytes"] >= metrics["system/cuda_allocated_bytes"] >= tensor.nbytes
    assert metrics["system/cuda_peak_allocated_bytes"] >= tensor.nbytes
    assert "GPU memory" in memory_text(device)
    machine = Machine(device).metrics()
    assert machine["system/gpu_0_memory_usage_megabytes"] >= tensor.nbytes / 1e6
    shares = {name: value for name, value in machine.items() if name.endswith("_percentage")}
    assert "system/gpu_0_memory_usage_percentage" in shares
    assert all(0 <= value <= 100 for value in shares.values())
