"""A training that is stopped anywhere and goes on is, to the bit, the one that was never stopped."""

from __future__ import annotations

import shutil
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cvft.checkpoint import INFO_FILE, MODEL_FILE, TRAINING_FILE, read_info, read_state
from cvft.distributed import current_world
from cvft.errors import CheckpointError
from jobs import train
from jobs.config import ExperimentConfig
from jobs.training import worker
from jobs.training.saving import checkpoints_of
from pipeline.cache import default_cache
from pipeline.checkpoints import checkpoint_name, fetch
from pipeline.evaluation import evaluate_checkpoint
from tests.distributed_helper import run_distributed

SETTINGS = ("train.num_epochs=2", "model.backbone.dropout=0.2", "train.loss.kind=info_nce")
CPU = torch.device("cpu")


class PowerCut(Exception):
    pass


def run(config: ExperimentConfig, **hooks) -> bool:
    return worker.train(config, device=CPU, on_epoch=lambda _: None, **hooks)


def run_with_a_stop_after_every_step(config: ExperimentConfig) -> int:
    """Leave after each step, as before a preemption, and go on in a new training; return how many it took."""
    num_trainings = 1
    while not run(config, should_leave=lambda _: True):
        num_trainings += 1
    return num_trainings


def run_until(config: ExperimentConfig, step: int) -> None:
    """Train until the power fails after so many steps, without notice; what was to be saved before has been written."""
    folder, every, steps_per_epoch = checkpoints_of(config), config.train.checkpoint_every_steps, 3

    def cut(report) -> None:
        done = report.step + 1
        while done % every == 0 and done % steps_per_epoch and checkpoint_name(done) not in folder.names():
            time.sleep(0.005)
        if report.step + 1 == step:
            raise PowerCut

    with pytest.raises(PowerCut):
        run(config, on_step=cut)


def newest(config: ExperimentConfig) -> Path:
    folder = checkpoints_of(config)
    return fetch(folder.uri(folder.names()[-1]), cache=default_cache().parent)


def assert_same(config: ExperimentConfig, straight: ExperimentConfig) -> None:
    """Weights, moments, loss parameters, the loss of every step and the means of the epochs are equal to the bit."""
    ours, theirs = newest(config), newest(straight)
    assert read_info(ours).step == read_info(theirs).step
    for file in (MODEL_FILE, TRAINING_FILE):
        tensors = safetensors.torch.load_file(ours / file)
        expected = safetensors.torch.load_file(theirs / file)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    curve, expected_curve = (read_state(path, "curve").tensors["losses"] for path in (ours, theirs))
    assert curve.dtype == torch.float64
    assert torch.equal(curve, expected_curve)
    assert len(curve) == read_info(theirs).step
    measured, expected_epochs = (read_info(path).training["epochs"] for path in (ours, theirs))
    for epoch, expected_epoch in zip(measured, expected_epochs, strict=True):
        assert {**epoch, "pairs_per_s": 0} == {**expected_epoch, "pairs_per_s": 0}


@pytest.fixture
def straight(tiny) -> ExperimentConfig:
    """A training that ran to its end in one go."""
    config = tiny("name=straight", *SETTINGS)
    assert run(config)
    return config


def test_stopped_with_notice_after_every_single_step(tiny, straight):
    config = tiny("name=stopped", *SETTINGS)
    num_steps = read_info(newest(straight)).step
    assert num_steps >= 4
    assert run_with_a_stop_after_every_step(config) == num_steps + 1
    assert_same(config, straight)


def test_cut_off_inside_an_epoch_it_goes_on_from_the_last_step_that_was_saved(tiny, straight):
    config = tiny("name=cut", *SETTINGS, "train.checkpoint_every_steps=2")
    num_steps = read_info(newest(straight)).step
    run_until(config, num_steps - 1)
    assert newest(config).name == f"step-{(num_steps - 1) // 2 * 2:08d}"
    first_steps = []
    assert run(config, on_step=lambda report: first_steps.append(report.step))
    assert first_steps[0] == (num_steps - 1) // 2 * 2
    assert_same(config, straight)


def test_with_averaged_weights_and_recomputed_activations_too(tiny):
    options = (*SETTINGS, "train.ema_decay=0.9", "train.checkpoint_every_steps=1")
    whole = tiny("name=whole", *options)
    assert run(whole)
    stopped = tiny("name=stopped", *options, "train.activation_checkpointing=true")
    assert run_with_a_stop_after_every_step(stopped) > 4
    assert_same(stopped, whole)
    averaged = safetensors.torch.load_file(newest(whole) / MODEL_FILE)
    raw, raw_expected = (read_state(newest(config), "average").tensors for config in (stopped, whole))
    assert raw.keys() == raw_expected.keys()
    assert all(torch.equal(raw[name], raw_expected[name]) for name in raw)
    assert not any(torch.equal(raw[name], averaged[name]) for name in raw)
    plain = tiny("name=plain", *SETTINGS)
    assert run(plain)
    weights = safetensors.torch.load_file(newest(plain) / MODEL_FILE)
    assert all(torch.equal(raw[name], weights[name]) for name in raw)  # the average does not touch the training


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip_a_bit(path / MODEL_FILE),
        lambda path: flip_a_bit(path / "state-curve.safetensors"),
        lambda path: (path / TRAINING_FILE).write_bytes((path / TRAINING_FILE).read_bytes()[:-8]),
        lambda path: (path / INFO_FILE).write_text((path / INFO_FILE).read_text().replace('"step": 3', '"step": 2')),
        lambda path: (path / MODEL_FILE).unlink(),
    ],
    ids=["flipped bit", "flipped bit in the curve", "truncated", "changed position", "missing"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tiny, straight, damage, caplog):
    config = tiny("name=damaged", *SETTINGS, "train.checkpoint_every_steps=1", "train.keep_last=3")
    run_until(config, 4)
    names = checkpoints_of(config).names()
    assert names == [f"step-{step:08d}" for step in (2, 3, 4)]
    shutil.rmtree(newest(config))
    damage(newest(config))
    first_steps = []
    assert run(config, on_step=lambda report: first_steps.append(report.step))
    assert "step-00000003 cannot be used, taking the one before it" in caplog.text
    assert first_steps[0] == 2
    assert_same(config, straight)


def test_when_all_are_damaged_nothing_is_begun_anew(tiny):
    config = tiny(*SETTINGS, "train.checkpoint_every_steps=1")
    run_until(config, 2)
    for name in checkpoints_of(config).names():
        flip_a_bit(Path(checkpoints_of(config).uri(name), MODEL_FILE))
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints are damaged \(step-00000001, step-00000002\)"):
        run(config)
    assert len(checkpoints_of(config).names()) == 2


def two_ranks(straight: ExperimentConfig, stopped: ExperimentConfig, damaged: ExperimentConfig) -> None:
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")  # torch, of 1x1 channels_last
    assert run(straight)
    run_with_a_stop_after_every_step(stopped)
    run_until(damaged, 3)
    if current_world().rank == 0:
        assert_same(stopped, straight)
        flip_a_bit(newest(damaged) / MODEL_FILE)
    assert run(damaged)
    if current_world().rank == 0:
        assert_same(damaged, straight)


def test_two_ranks_agree_on_where_to_go_on(tiny):
    configs = [tiny(f"name={name}", *SETTINGS, "train.checkpoint_every_steps=1") for name in ("a", "b", "c")]
    run_distributed(two_ranks, 2, *configs)


@pytest.mark.objectstore
def test_a_store_that_is_away_for_a_while_stops_no_training(tiny, straight, s3_uri, s3_proxy, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", f"{straight.output}/cache")
    config = tiny("name=remote", f"output={s3_uri}", *SETTINGS, "train.checkpoint_every_steps=1")

    def break_and_mend(report) -> None:
        if report.step == 0:
            s3_proxy.go_away()
        elif report.step == 3:
            while "trying again" not in caplog.text:
                time.sleep(0.01)
            s3_proxy.come_back()

    assert run(config, on_step=break_and_mend)
    assert "the server cannot be reached" in caplog.text
    assert "the store is back after" in caplog.text
    assert_same(config, straight)


def test_early_stopping_counts_evaluations_without_a_better_recall_whoever_resumes(tiny):
    settings = "train.num_epochs=9", "train.early_stopping=2", "train.optimizer.learning_rate=1e-12"
    result = train.train(tiny("name=patient", *settings))
    # With a rate of nothing, the first evaluation is the best one.
    assert (result["epoch"], result["epochs_done"], result["stopped_early"]) == (1, 3, True)
    assert train.train(tiny("name=patient", *settings)) == result
    stopped = tiny("name=stopped", *settings)
    run_with_a_stop_after_every_step(stopped)
    assert_same(stopped, tiny("name=patient", *settings))


def test_training_reports_recall_by_distance_as_evaluation_does(tiny, manifest_uri):
    config = tiny("train.num_epochs=1", "data.hit_distance_m=60")
    assert run(config)
    metrics = read_info(newest(config)).metrics
    found = evaluate_checkpoint(str(newest(config)), manifest_uri, hit_distance_m=60).metrics()
    assert metrics["recall_at_1_within_60m"] > 0
    assert {name: metrics[name] for name in found} == found
