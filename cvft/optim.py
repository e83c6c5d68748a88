"""The optimizer and the course of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from cvft.config import OptimizerConfig
from cvft.errors import ConfigError


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, loss: nn.Module | None = None) -> Optimizer:
    """Build the optimizer over the trainable parameters of the model and of the loss, in their own order.

    Matrices and kernels form the first group, which decays; biases, the scales of norms (one axis) and a temperature
    (none) form the second, which does not. `adam` adds the decay to the gradient (L2), `adamw` shrinks the weights
    directly.

    Raises:
        ConfigError: Every parameter is frozen.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("num_frozen_blocks: every parameter of the model is frozen; leave something to train")
    trainable += [] if loss is None else loss.parameters()
    kinds: dict[str, type[Adam]] = {"adam": Adam, "adamw": AdamW}
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return kinds[config.kind](groups, lr=config.learning_rate)


def clip_gradients(optimizer: Optimizer, max_norm: float | None) -> Tensor:
    """Scale all gradients of the optimizer down to a common norm of `max_norm`, where they are larger.

    Returns:
        Scalar, their norm before; under DDP, where gradients are averaged already, the same on every rank.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def build_schedule(config: OptimizerConfig, *, num_steps: int) -> Callable[[int], float]:
    """Return the learning rate as a pure function of the step, so that a resumed training needs no scheduler state.

    Over the first `warmup_fraction` of the steps the rate rises linearly and reaches the full rate at the last of them
    (the first step already learns). Then it stays (`constant`) or falls along half a cosine to zero at step
    `num_steps` (`cosine`).

    Args:
        config: The optimizer's configuration.
        num_steps: Steps of the whole training; steps are counted from 0.
    """
    num_warmup = round(config.warmup_fraction * num_steps)

    def learning_rate(step: int) -> float:
        if step < num_warmup:
            return config.learning_rate * (step + 1) / num_warmup
        if config.schedule == "constant":
            return config.learning_rate
        progress = min((step - num_warmup) / max(num_steps - num_warmup, 1), 1.0)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    return learning_rate
