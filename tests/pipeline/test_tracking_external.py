"""External models: one for each checkpoint however often it is told, and the run's numbers stay what they were."""

import shutil

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.tracking.external import record_checkpoints
from pipeline.tracking.runs import create_run
from pipeline.tracking.server import prepare


@pytest.fixture(scope="module")
def tracking(mlflow_schema, tmp_path_factory):
    file = tmp_path_factory.mktemp("external") / "mlflow.db"
    shutil.copyfile(mlflow_schema, file)
    return prepare(f"sqlite:///{file}", experiment="town")


@pytest.fixture
def run(tracking, request):
    made = create_run(tracking, name="a", identity=request.node.name)
    for split, context in (("train", "training"), ("val", "evaluation")):
        made.log_dataset(name=f"town {split}", digest="d" * 64, source="s3://b/manifest", context=context)
    return made


def checkpoint(step, recall):
    return {
        "name": f"step-{step:08d}",
        "uri": f"s3://b/runs/v1.0/checkpoints/step-{step:08d}",
        "step": step,
        "metrics": {"recall_at_1": recall, "recall_at_5": recall + 0.1},
    }


def record(run, *checkpoints, kept=()):
    record_checkpoints(run, model="v1.0", checkpoints=checkpoints, kept=[f"step-{step:08d}" for step in kept])


def models(run):
    """The run's models by step, as MLflow has them."""
    experiment = run.client.get_run(run.run_id).info.experiment_id
    found = run.client.search_logged_models([experiment], f"source_run_id = '{run.run_id}'")
    by_step = {int(model.params["step"]): run.client.get_logged_model(model.model_id) for model in found}
    assert len(by_step) == len(found)
    return by_step


def kept(run):
    return {step: model.tags["is_kept"] for step, model in sorted(models(run).items())}


def history(run, name):
    return [(metric.step, metric.value) for metric in run.client.get_metric_history(run.run_id, name)]


def test_a_checkpoint_told_twice_is_one_model_with_its_place_recalls_and_dataset(run):
    run.log_metrics({"recall_at_1": 0.5, "recall_at_5": 0.6, "loss": 1.0}, step=10)
    for _ in range(2):
        record(run, checkpoint(10, 0.5), kept=[10])
    model = models(run)[10]
    assert (model.name, model.status.value, model.model_type) == ("v1_0-step-00000010", "READY", "checkpoint")
    assert model.tags["checkpoint_uri"] == "s3://b/runs/v1.0/checkpoints/step-00000010"
    assert model.tags["mlflow.model.isExternal"] == "true"
    told = {
        (metric.key, metric.value, metric.step, metric.dataset_name, metric.dataset_digest) for metric in model.metrics
    }
    assert told == {("recall_at_1", 0.5, 10, "town val", "d" * 36), ("recall_at_5", 0.6, 10, "town val", "d" * 36)}
    outputs = run.client.get_run(run.run_id).outputs.model_outputs
    assert [(output.model_id, output.step) for output in outputs] == [(model.model_id, 10)]
    assert (history(run, "recall_at_1"), history(run, "loss")) == ([(10, 0.5)], [(10, 1.0)])
    inputs = run.client.get_run(run.run_id).inputs.dataset_inputs
    assert sorted((found.dataset.name, found.tags[0].value) for found in inputs) == [
        ("town train", "training"),
        ("town val", "evaluation"),
    ]


def test_a_checkpoint_that_is_gone_says_so(run):
    for step in (10, 20, 30):
        record(run, checkpoint(step, step / 100), kept=[step - 10, step])
    assert kept(run) == {10: "false", 20: "true", 30: "true"}
    record(run, kept=[30])
    assert kept(run) == {10: "false", 20: "false", 30: "true"}
    record(run, *(checkpoint(step, step / 100) for step in (10, 20, 30, 40)), kept=[30, 40])
    assert kept(run) == {10: "false", 20: "false", 30: "true", 40: "true"}


@pytest.mark.parametrize("call", ["log_model_artifacts", "log_outputs", "log_batch", "finalize_logged_model"])
def test_what_broke_off_on_the_way_is_completed_and_not_doubled(run, call, monkeypatch):
    run.log_metrics({"recall_at_1": 0.5, "recall_at_5": 0.6}, step=10)
    done = getattr(MlflowClient, call)

    def without_an_answer(*arguments, **named):
        done(*arguments, **named)
        raise MlflowException("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, without_an_answer)
        with pytest.raises(MlflowException):
            record(run, checkpoint(10, 0.5), kept=[10])
    record(run, checkpoint(10, 0.5), kept=[10])
    model = models(run)[10]
    assert model.status.value == "READY"
    assert sorted(metric.key for metric in model.metrics) == ["recall_at_1", "recall_at_5"]
    assert len(run.client.get_run(run.run_id).outputs.model_outputs) == 1
    assert history(run, "recall_at_1") == [(10, 0.5)]


def test_an_evaluation_done_again_with_another_rounding_leaves_the_run_its_first_number(run):
    run.log_metrics({"recall_at_1": 0.5, "recall_at_5": 0.6}, step=10)
    record(run, checkpoint(10, 0.5000001), kept=[10])
    assert history(run, "recall_at_1") == [(10, 0.5)]
    assert {metric.value for metric in models(run)[10].metrics} == {0.5, 0.6}
