import math

import pytest
import torch
from torch import nn

from cvft.config import OptimizerConfig
from cvft.errors import ConfigError
from cvft.optim import build_optimizer, build_schedule


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))


def test_biases_and_norms_do_not_decay_and_frozen_tensors_are_left_out():
    model = _model()
    model[0].requires_grad_(False)
    decaying, sparing = build_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in decaying["params"]] == ["2.weight", "4.weight"]
    assert [names[id(parameter)] for parameter in sparing["params"]] == ["1.weight", "1.bias", "2.bias", "4.bias"]
    assert (decaying["weight_decay"], sparing["weight_decay"]) == (0.1, 0.0)


def test_adamw_shrinks_matrices_directly_and_adam_through_the_gradient():
    for kind, expected in (("adamw", 1 - 0.5 * 0.1), ("adam", 1 - 0.5)):  # Adam's first step has the size of the rate
        model = nn.Linear(1, 1)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)
        optimizer = build_optimizer(model, OptimizerConfig(kind=kind, learning_rate=0.5, weight_decay=0.1))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert model.weight.item() == pytest.approx(expected)
        assert model.bias.item() == 1


def test_a_wholly_frozen_model_is_refused():
    with pytest.raises(ConfigError, match="every parameter of the model is frozen"):
        build_optimizer(_model().requires_grad_(False), OptimizerConfig())


def test_constant_schedule_is_constant():
    schedule = build_schedule(OptimizerConfig(learning_rate=3e-4), num_steps=10)
    assert [schedule(step) for step in (0, 5, 99)] == [3e-4] * 3


def test_warmup_rises_linearly_to_the_full_rate():
    schedule = build_schedule(OptimizerConfig(learning_rate=1.0, warmup_fraction=0.4), num_steps=10)
    assert [schedule(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_to_zero_after_the_warmup():
    config = OptimizerConfig(learning_rate=2.0, warmup_fraction=0.2, schedule="cosine")
    schedule = build_schedule(config, num_steps=100)
    assert schedule(19) == schedule(20) == 2.0
    assert schedule(60) == pytest.approx(1.0)
    assert schedule(80) == pytest.approx(1 + math.cos(0.75 * math.pi))
    assert schedule(100) == schedule(1000) == 0
    rates = [schedule(step) for step in range(20, 101)]
    assert rates == sorted(rates, reverse=True)
