import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import ray
import safetensors.torch
import torch

from cvft.checkpoint import MODEL_FILE, read_info
from cvft.errors import CheckpointError, ConfigError, DataError, TrainingError
from jobs import evaluate, report, train
from jobs.training import rank
from jobs.training.progress import History
from pipeline.manifest import Manifest


def _weights(checkpoint):
    return safetensors.torch.load_file(Path(checkpoint) / MODEL_FILE)


def _newest(result):
    folder = Path(result["checkpoint"]).parent
    return folder / sorted(path.name for path in folder.iterdir())[-1]


@pytest.fixture
def one_thread():
    """As many as a worker on a CPU has: the order of sums, and so the last bit, hangs on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _main(module, arguments, capfd):
    code = module.entry.main(module.JOB, arguments)
    out, err = capfd.readouterr()
    return code, json.loads(out.splitlines()[-1]) if code == 0 else None, err


def test_a_training_that_diverges_names_the_keys_and_keeps_the_pixels(tiny, tmp_path, manifest_uri, monkeypatch):
    def diverge(*arguments, **options):
        (batch, *_) = arguments[1]
        raise rank.DivergenceError("step 5: nan", step=5, index=batch.index, batch=batch)

    monkeypatch.setattr(rank, "train_epoch", diverge)
    with pytest.raises(TrainingError, match=r"step 5: nan; keys \['\w+', .*\], pixels in .*diverged/step-00000005"):
        train.train(tiny("train.num_epochs=1"))
    saved = safetensors.torch.load_file(tmp_path / "runs/town/diverged/step-00000005/rank-0.safetensors")
    assert saved["ground"].shape == (4, 32, 176, 3)
    assert saved["index"].shape == (4,)
    # A place that cannot be written does not hide why the training ended.
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs/other/diverged").touch()
    with pytest.raises(TrainingError, match=r"step 5: nan; keys \['\w+', .*\], pixels in no file \(.*diverged"):
        train.train(tiny("train.num_epochs=1", "name=other"))


def test_a_finished_run_is_only_reported_and_keeps_its_mlflow_run(tiny):
    first = train.train(tiny("train.num_epochs=2"))
    again = train.train(tiny("train.num_epochs=2"))
    assert again == first


def test_the_result_is_that_of_the_best_checkpoint_and_only_it_and_the_two_newest_are_kept(tiny):
    result = train.train(tiny("train.num_epochs=5", "train.optimizer.learning_rate=3e-3"))
    epochs = read_info(_newest(result)).training["epochs"]
    assert len(epochs) == 5
    assert result["recall_at_1"] == max(epoch["recall_at_1"] for epoch in epochs)
    assert read_info(Path(result["checkpoint"])).metrics["recall_at_1"] == result["recall_at_1"]
    newest = [f"step-{epochs[-1 - back]['step']:08d}" for back in (0, 1)]
    kept = {path.name for path in Path(result["checkpoint"]).parent.iterdir()}
    assert kept == {Path(result["checkpoint"]).name, *newest}


def test_a_run_begun_with_another_configuration_is_refused_by_the_key_that_differs(tiny):
    train.train(tiny("train.num_epochs=1"))
    with pytest.raises(
        ConfigError, match=r"run 'town' was begun otherwise: train.seed=5 \(was 0\); choose another name="
    ):
        train.train(tiny("train.num_epochs=1", "train.seed=5"))
    assert train.train(tiny("train.num_epochs=1", "data.num_threads=2"))["epoch"] == 1


def test_the_resolved_configuration_and_the_numbers_are_in_mlflow(tiny):
    config = tiny("train.num_epochs=2")
    result = train.train(config)
    run = train.Run(uri=config.tracking.uri, run_id=result["run_id"]).client.get_run(result["run_id"])
    assert run.data.params["train.loss.gamma"] == "10.0"
    assert run.data.metrics["recall_at_1_percent"] == pytest.approx(
        read_info(_newest(result)).metrics["recall_at_1_percent"]
    )
    assert run.inputs.dataset_inputs[0].dataset.digest
    assert run.info.status == "FINISHED"


def test_a_split_that_the_manifest_lacks_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(DataError, match="split 'test' is not in"):
        train.train(tiny("data.eval_split=test"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_two_ray_workers_train_what_one_process_trains(tiny, ray_cluster, manifest_uri, tmp_path, monkeypatch):
    settings = ["train.num_epochs=2", "model.backbone.dropout=0.2"]
    alone = train.train(tiny("name=alone", *settings))
    # Ray's workers run in folders of their own: relative paths are those of the command.
    monkeypatch.chdir(tmp_path)
    places = ["output=elsewhere", f"data.manifest={os.path.relpath(manifest_uri)}"]
    both = train.train(tiny("name=both", *settings, *places, "train.workers=2", "train.chunk_size=1"))
    assert both["checkpoint"].startswith(f"{tmp_path}/elsewhere/both/")
    ours, theirs = (read_info(_newest(run)).training["epochs"] for run in (both, alone))
    assert [epoch["loss"] for epoch in ours] == pytest.approx([epoch["loss"] for epoch in theirs], abs=1e-5)
    for name, tensor in _weights(_newest(alone)).items():
        torch.testing.assert_close(_weights(_newest(both))[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.ray
@pytest.mark.slow
def test_one_worker_of_a_cluster_trains_what_this_process_trains(tiny, ray_cluster, one_thread, monkeypatch):
    here = train.train(tiny("name=here", "train.num_epochs=2"))
    monkeypatch.setattr(train.worker, "train", lambda *_, **__: pytest.fail("trained in the driver"))
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    there = train.train(tiny("name=there", "train.num_epochs=2"))
    assert there["recall_at_1"] == here["recall_at_1"]
    for name, tensor in _weights(_newest(here)).items():
        assert torch.equal(_weights(_newest(there))[name], tensor), name


@pytest.mark.ray
@pytest.mark.slow
def test_a_workers_data_error_ends_the_job_as_the_users_error(tiny, ray_cluster, manifest_uri, tmp_path):
    store = Path(manifest_uri).parent.parent
    damaged = tmp_path / "damaged"
    shutil.copytree(store, damaged)
    for shard in (damaged / "shards").rglob("train-*.tar"):
        data = bytearray(shard.read_bytes())
        for position in range(2048, len(data), 4096):
            data[position] ^= 1
        shard.write_bytes(data)
    moved = manifest_uri.replace(str(store), str(damaged))
    for max_failures in (0, 1):  # without and with a restart
        settings = [f"name=damaged{max_failures}", "train.workers=2", f"train.max_failures={max_failures}"]
        with pytest.raises(TrainingError, match=r"train-0000.\.tar, key \w+: .* have changed since they were sharded"):
            train.train(tiny(f"data.manifest={moved}", *settings))


def test_evaluate_and_report_from_the_command_line(tiny, manifest_uri, tmp_path, capfd, caplog):
    result = train.train(tiny("train.num_epochs=1"))
    where = ["--checkpoint", result["checkpoint"], "--manifest", manifest_uri]
    with caplog.at_level("INFO", logger="cvft"):
        code, measured, _ = _main(evaluate, where, capfd)
    assert (code, measured["recall_at_1"], measured["chance"]) == (0, result["recall_at_1"], result["chance"])
    assert "R@10" in caplog.text
    assert "embedding: 4/4 pairs" in caplog.text
    code, made, _ = _main(report, [*where, "--out", str(tmp_path / "report")], capfd)
    assert code == 0
    assert "<html" in Path(made["report"]).read_text()


def test_other_preprocessing_than_trained_with_is_refused_unless_said(tiny, manifest_uri, capfd):
    result = train.train(tiny("train.num_epochs=1"))
    where = ["--checkpoint", result["checkpoint"], "--manifest", manifest_uri, "preprocess.channel_order=bgr"]
    code, _, err = _main(evaluate, where, capfd)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "channel_order" in err
    code, _, _ = _main(evaluate, [*where, "--allow-other-preprocess"], capfd)
    assert code == 0


def test_evaluating_what_is_no_checkpoint_says_so(manifest_uri, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        evaluate.evaluate_checkpoint(str(tmp_path / "nothing"), manifest_uri)


def test_history_keeps_the_first_of_equally_good_epochs():
    history = History().then({"recall_at_1": 0.5, "step": 3}).then({"recall_at_1": 0.5, "step": 6})
    assert (history.best, len(history.epochs)) == ("step-00000003", 2)
    assert dataclasses.asdict(history)["best_recall_at_1"] == 0.5


def test_a_store_in_the_manifests_place_is_followed_once_so_that_restarted_workers_read_the_same(
    tiny, manifest_uri, tmp_path, monkeypatch
):
    trained = []
    monkeypatch.setattr(train.worker, "train", lambda config, **_: trained.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(tiny(f"data.manifest={Manifest.load(manifest_uri).store_uri}"))
    assert trained[0].data.manifest == manifest_uri
