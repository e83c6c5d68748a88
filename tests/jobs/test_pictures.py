from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cvft.checkpoint import read_info
from jobs import pictures, train
from jobs.config import load
from pipeline.storage import Store
from pipeline.tracking.runs import Run
from tests.jobs.conftest import TINY

NAMES = {"report.html", "figures/training.png", "figures/confusion_by_distance.png", "figures/transport_1.png"}


def _in_mlflow(config, result):
    """Names of the artifacts below `report`, and the run's description."""
    client = Run(uri=config.tracking.uri, run_id=result["run_id"]).client

    def below(path):
        for found in client.list_artifacts(result["run_id"], path):
            yield from below(found.path) if found.is_dir else [found.path]

    names = {path.removeprefix("report/") for path in below("report")}
    return names, client.get_run(result["run_id"]).data.tags.get(pictures.NOTE_TAG)


@pytest.fixture(scope="module")
def trained(manifest_uri, tracking_uri, tmp_path_factory):
    """The configuration and the result of a training that drew its pictures."""
    places = [
        f"data.manifest={manifest_uri}",
        f"tracking.uri={tracking_uri}",
        f"output={tmp_path_factory.mktemp('out')}",
    ]
    config = load("town", [*places, *TINY, "train.workers=1", "train.num_epochs=2"])
    return config, train.train(config)


def test_a_training_ends_with_its_report_in_its_folder_and_in_mlflow(trained):
    config, result = trained
    names, note = _in_mlflow(config, result)
    files = Store.from_uri(f"{config.folder}/report").list()
    assert names == set(files)
    assert names >= NAMES | {"figures/best_1.png", "figures/worst_1.png"}
    best = read_info(Path(result["checkpoint"]))
    assert f"**recall@1 {result['recall_at_1']:.1%}** (a guess: 25.00%)" in note
    assert f"recall@5 {result['recall_at_5']:.1%}" in note
    assert f"`{Path(result['checkpoint']).name}`, epoch {best.epoch} of 2" in note
    assert "within 5 m and" in note
    assert all(f"- `report/{name}`: " in note for name in NAMES)
    html = (Path(config.folder) / "report/report.html").read_text(encoding="utf-8")
    assert "Loss and recalls over 2 epochs" in html  # also where the first of them is the best
    assert f"{100 * result['recall_at_1']:.2f} %" in html


def test_pictures_that_cannot_be_drawn_are_a_warning_with_the_reason(trained, caplog):
    config, result = trained
    lost = replace(config, data=replace(config.data, manifest="/nowhere/manifest.parquet"))
    pictures.log_pictures(lost, Run(uri=config.tracking.uri, run_id=result["run_id"]), device=torch.device("cpu"))
    assert "the pictures of town are not in MLflow: /nowhere/manifest.parquet" in caplog.text


def test_a_bug_in_a_picture_keeps_its_traceback(trained, monkeypatch):
    config, result = trained
    monkeypatch.setattr(pictures, "evaluate_checkpoint", lambda *_, **__: 1 / 0)
    run = Run(uri=config.tracking.uri, run_id=result["run_id"])
    with pytest.raises(ZeroDivisionError):
        pictures.log_pictures(config, run, device=torch.device("cpu"))
    quiet = replace(config, tracking=replace(config.tracking, pictures=False))
    pictures.log_pictures(quiet, run, device=torch.device("cpu"))  # nothing is looked at


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.objectstore
def test_rank_0_of_two_ray_workers_draws_into_a_bucket(tiny, ray_cluster, s3_uri):
    config = tiny("train.num_epochs=1", "train.workers=2", f"output={s3_uri}/runs", "tracking.pictures=true")
    result = train.train(config)
    names, note = _in_mlflow(config, result)
    assert names == set(Store.from_uri(f"{config.folder}/report").list())
    assert names >= NAMES
    assert f"**recall@1 {result['recall_at_1']:.1%}**" in note
