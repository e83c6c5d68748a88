import copy
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cvft.config import LossConfig, OptimizerConfig
from cvft.engine import DivergenceError, EpochReport, StepReport, embed, evaluate, train_epoch
from cvft.errors import DataError, TrainingError
from cvft.loss import build_loss
from cvft.optim import build_optimizer, build_schedule
from tests.cvft.tiny import TinyModel, eval_batches, preprocess, random_batch, train_batches

OPTIMIZER = OptimizerConfig(kind="adamw", learning_rate=1e-2, weight_decay=0.1, schedule="cosine", warmup_fraction=0.2)


def _train(model, optimizer, batches, *, first_step=0, seed=0, num_steps=8) -> tuple[EpochReport, list[StepReport]]:
    steps: list[StepReport] = []
    report = train_epoch(
        model,
        batches,
        preprocess=preprocess,
        loss=build_loss(LossConfig()),
        optimizer=optimizer,
        learning_rate=build_schedule(OPTIMIZER, num_steps=num_steps),
        first_step=first_step,
        seed=seed,
        on_step=steps.append,
    )
    return report, steps


def _weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_training_lowers_the_loss_and_reports_every_step():
    model = TinyModel()
    batches = train_batches(1) * 30  # the same batch again and again
    report, steps = _train(model, build_optimizer(model, OPTIMIZER), batches, first_step=5, num_steps=35)
    assert [step.step for step in steps] == list(range(5, 35))
    assert steps[-1].loss < 0.1 * steps[0].loss
    assert [step.learning_rate for step in steps] == [build_schedule(OPTIMIZER, num_steps=35)(s) for s in range(5, 35)]
    assert all(step.pairs_per_s == pytest.approx(8 / (step.data_wait_s + step.step_s)) for step in steps)
    assert report.num_steps == 30
    assert report.loss == pytest.approx(sum(step.loss for step in steps) / 30)
    assert report.pairs_per_s == pytest.approx(240 / report.seconds)


def test_resuming_equals_a_straight_run_bitwise():
    straight = TinyModel(dropout=0.3)
    straight_report = _train(straight, build_optimizer(straight, OPTIMIZER), train_batches(8))[1]

    first = TinyModel(dropout=0.3)
    optimizer = build_optimizer(first, OPTIMIZER)
    first_report = _train(first, optimizer, train_batches(4))[1]
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    torch.manual_seed(999)  # the generator's state is lost with the process

    second = TinyModel(dropout=0.3, seed=1)
    optimizer = build_optimizer(second, OPTIMIZER)
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    second_report = _train(second, optimizer, train_batches(8, first_step=4), first_step=4)[1]

    assert torch.equal(_weights(second), _weights(straight))
    assert [step.loss for step in straight_report] == [step.loss for step in first_report + second_report]


def test_dropout_differs_by_step_and_by_seed():
    class Still(torch.optim.SGD):
        def step(self, closure=None):
            return None

    losses = []
    for seed in (0, 0, 1):
        model = TinyModel(dropout=0.5)
        _, steps = _train(model, Still(model.parameters()), train_batches(1) * 2, seed=seed)
        losses.append([step.loss for step in steps])
    assert losses[0] == losses[1]
    assert len({*losses[0], *losses[2]}) == 4


def test_a_loss_that_is_not_finite_names_step_and_pairs_and_leaves_the_weights_alone():
    model = TinyModel()
    good, bad = train_batches(2, size=4)
    with torch.no_grad():
        before = _weights(model).clone()

    def broken(pixels: torch.Tensor) -> torch.Tensor:
        return preprocess(pixels) * math.nan

    with pytest.raises(
        DivergenceError, match=r"step 7: the loss is nan on the pairs \[4, 5, 6, 7\]; lower the"
    ) as caught:
        train_epoch(
            model,
            [bad],
            preprocess=broken,
            loss=build_loss(LossConfig()),
            optimizer=build_optimizer(model, OPTIMIZER),
            learning_rate=lambda step: 1.0,
            first_step=7,
            seed=0,
        )
    assert torch.equal(_weights(model), before)
    assert (caught.value.step, caught.value.index.tolist()) == (7, [4, 5, 6, 7])
    assert torch.equal(caught.value.batch.ground, bad.ground)
    _train(model, build_optimizer(model, OPTIMIZER), [good])


def test_gradients_that_are_not_finite_stop_a_step_whose_loss_is():
    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    model = TinyModel()
    before = _weights(model).clone()
    model.register_forward_hook(lambda module, inputs, outputs: (Exploding.apply(outputs[0]), outputs[1]))
    with pytest.raises(DivergenceError, match=r"step 2: the gradient's norm is (nan|inf) on the pairs \[0, 1, 2, 3\]"):
        _train(model, build_optimizer(model, OPTIMIZER), train_batches(1, size=4), first_step=2)
    assert torch.equal(_weights(model), before)


def test_gradients_are_scaled_down_to_the_given_norm_of_all_parameters_and_no_further():
    moves, norms = {}, {}
    for max_norm in (None, 1e6, 0.25):
        model, loss = TinyModel(), build_loss(LossConfig(kind="info_nce"))
        start, steps = _weights(model).clone(), []
        start_scale = loss.log_scale.item()
        train_epoch(
            model,
            train_batches(1),
            preprocess=preprocess,
            loss=loss,
            optimizer=torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=1.0),
            learning_rate=lambda step: 1.0,
            first_step=0,
            seed=0,
            max_gradient_norm=max_norm,
            on_step=steps.append,
        )
        moves[max_norm] = torch.cat([_weights(model) - start, loss.log_scale.detach()[None] - start_scale])
        norms[max_norm] = steps[0].gradient_norm
    assert norms[None] == norms[1e6] == norms[0.25] > 1
    assert moves[None].norm().item() == pytest.approx(norms[None], rel=1e-4)
    assert torch.equal(moves[None], moves[1e6])
    assert moves[0.25].norm().item() == pytest.approx(0.25, rel=1e-3)
    torch.testing.assert_close(moves[0.25] / 0.25, moves[None] / norms[None], rtol=1e-3, atol=1e-5)


def test_an_epoch_without_batches_is_refused():
    model = TinyModel()
    with pytest.raises(TrainingError, match="no batch to train on at step 3"):
        _train(model, build_optimizer(model, OPTIMIZER), [], first_step=3)


def test_frozen_parameters_stay_as_they_are():
    model = TinyModel()
    model.ground.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    _train(model, build_optimizer(model, OPTIMIZER), train_batches(3))
    assert torch.equal(model.ground.weight, before["ground.weight"])
    assert not torch.equal(model.aerial.weight, before["aerial.weight"])


def test_embedding_equals_one_batch_of_the_whole_split_and_cuts_the_padding():
    model = TinyModel(dropout=0.5)
    found = embed(model, eval_batches(19), preprocess=preprocess, num_pairs=19)
    model.eval()
    whole = random_batch(torch.arange(19))
    ground, aerial = model(preprocess(whole.ground), preprocess(whole.aerial))
    torch.testing.assert_close(found.ground, ground.detach())
    torch.testing.assert_close(found.aerial, aerial.detach())
    assert torch.equal(found.index, torch.arange(19))
    assert torch.equal(found.location_m, whole.location_m)
    assert found.ground.dtype == torch.float32
    assert not found.ground.requires_grad


def test_embedding_puts_shuffled_rows_in_order():
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    model = TinyModel()
    shuffled = embed(model, [random_batch(order[:8]), random_batch(order[8:])], preprocess=preprocess)
    straight = embed(model, eval_batches(16), preprocess=preprocess)
    torch.testing.assert_close(shuffled.ground, straight.ground)
    torch.testing.assert_close(shuffled.aerial, straight.aerial)


@pytest.mark.parametrize(
    ("rows", "num_pairs", "words"),
    [
        ([0, 1, 3], None, r"3 rows of 4: 1 missing \(first \[2\]\), 0 doubled"),
        ([0, 1, 2], 5, r"3 rows of 5: 2 missing \(first \[3, 4\]\)"),
        ([0, 1, 1, 2], 3, r"4 rows of 3: 0 missing \(first \[\]\), 1 doubled \(first \[1\]\)"),
        ([0, 1, 2], 2, "3 rows of 2"),
        ([], 2, r"0 rows of 2: 2 missing \(first \[0, 1\]\)"),
        ([], None, "0 rows of 0"),
    ],
)
def test_missing_and_doubled_rows_are_refused(rows, num_pairs, words):
    batches = [random_batch(torch.tensor(rows))] if rows else []
    with pytest.raises(DataError, match=words):
        embed(TinyModel(), batches, preprocess=preprocess, num_pairs=num_pairs)


def test_evaluation_gives_every_part_its_mode_back():
    model = TinyModel(dropout=0.5)
    model.train()
    model.aerial.eval()
    evaluate(model, eval_batches(9), preprocess=preprocess)
    assert [part.training for part in (model, model.ground, model.aerial, model.dropout)] == [True, True, False, True]
    with pytest.raises(DataError):
        evaluate(model, [], preprocess=preprocess)
    assert model.dropout.training


def test_evaluation_finds_what_training_taught():
    model = TinyModel()
    batches = [random_batch(torch.arange(24))] * 60
    before = evaluate(model, eval_batches(24), preprocess=preprocess).recall_at(1)
    _train(model, build_optimizer(model, OPTIMIZER), batches, num_steps=60)
    result = evaluate(model, eval_batches(24), preprocess=preprocess, num_top=3)
    assert result.recall_at(1) == 1 > before
    assert result.top_indices.shape == (24, 3)
    assert torch.equal(result.top_indices[:, 0], torch.arange(24))


def test_evaluating_a_diverged_model_names_the_rows():
    model = TinyModel()
    nn.init.constant_(model.ground.weight, math.nan)
    with pytest.raises(
        TrainingError, match=r"9 of 9 query descriptors are not finite, first in rows \[0, 1, 2, 3, 4\]"
    ):
        evaluate(model, eval_batches(9), preprocess=preprocess)


TORCHRUN_SCRIPT = """
import json, pathlib, sys

import torch

from cvft.config import LossConfig
from cvft.distributed import torchrun_world, wrap_ddp
from cvft.engine import evaluate, train_epoch
from cvft.loss import build_loss
from tests.cvft.tiny import TinyModel, eval_batches, preprocess, train_batches

with torchrun_world() as world:
    model = TinyModel()
    report = train_epoch(
        wrap_ddp(model), train_batches(3, rank=world.rank, world=world.size), preprocess=preprocess,
        loss=build_loss(LossConfig()), optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        learning_rate=lambda step: 0.1, first_step=0, seed=0,
    )
    result = evaluate(model, eval_batches(13, rank=world.rank, world=world.size), preprocess=preprocess)
    found = {"loss": report.loss, "size": world.size, "ranks": result.match_rank.tolist()}
    pathlib.Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(found))
threads = [file.read_text().strip() for file in pathlib.Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads  # one that ends with the interpreter aborts it
"""


def test_the_loops_run_under_torchrun_as_in_one_process(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN_SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    runpy.run_path(str(script))
    alone = json.loads((tmp_path / "0.json").read_text())
    assert first == second
    assert (alone["size"], first["size"]) == (1, 2)
    assert first["ranks"] == alone["ranks"]
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-6)
