"""The gradient of a converged plan by the implicit function theorem, whatever solver found the plan.

Where rows and columns both have their marginals, the plan P depends on the cost alone, not on the rounds that led to
it. The adjoints x and y of the potentials then solve x = seed_u - P (y / b) and y = seed_v - P^T (x / a): the backward
of one round on a constant tile, swept until it adds nothing more (Eisenberger et al. 2022, "A unified framework for
implicit Sinkhorn differentiation").

Shape letters: B problems, n sources, m targets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cvft.errors import ConfigError
from cvft.precision import full_precision
from cvft.sinkhorn import Solution

MAX_SWEEPS = 1000
SWEEPS_PER_LOOK = 10  # a look at the change makes the host wait for a GPU
UNSETTLED = 1e-2  # of the sum, in the last sweep


class ImplicitSolver(torch.autograd.Function):
    """Solve without a record of the rounds; the plan alone is differentiable, once."""

    @staticmethod
    def forward(
        ctx: Any,
        solver: Callable[..., Solution],
        cost: Tensor,
        a: Tensor,
        b: Tensor,
        epsilon: float,
        options: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        """Return the fields of the `Solution` that `solver(cost, a, b, epsilon=epsilon, **options)` gives."""
        solution = solver(cost.detach(), a.detach(), b.detach(), epsilon=epsilon, **options)
        ctx.epsilon = epsilon
        ctx.save_for_backward(a, b, solution.plan)
        ctx.mark_non_differentiable(*solution[1:])
        return tuple(solution)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_plan: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients in cost, a and b; those in a and b hold for changes that keep the masses equal."""
        a, b, plan = ctx.saved_tensors
        grad_logits = grad_plan * plan
        with full_precision(plan.device):
            wx, wy = _sweep(plan, a, b, grad_logits.sum(2), grad_logits.sum(1))
        grad_logits.sub_(plan * (wx.unsqueeze(2) + wy.unsqueeze(1)))
        return None, grad_logits.mul_(-1 / ctx.epsilon), wx, wy, None, None


def _sweep(plan: Tensor, a: Tensor, b: Tensor, seed_u: Tensor, seed_v: Tensor) -> tuple[Tensor, Tensor]:
    """Return x / a [B, n] and y / b [B, m], the adjoints of the potentials over the marginals."""
    plan_t = plan.transpose(1, 2).contiguous()
    wy = seed_v / b
    wx = (seed_u - torch.bmm(wy.unsqueeze(1), plan_t).squeeze(1)) / a
    total_x, total_y = wx, wy
    tolerance = torch.finfo(plan.dtype).eps
    for sweep in range(1, MAX_SWEEPS):
        wy = torch.bmm(wx.unsqueeze(1), plan).squeeze(1) / -b
        wx = torch.bmm(wy.unsqueeze(1), plan_t).squeeze(1) / -a
        total_x, total_y = total_x + wx, total_y + wy
        if sweep % SWEEPS_PER_LOOK == 0 and (wx.abs().amax(1) <= tolerance * total_x.abs().amax(1)).all():
            break
    # Sweeps that stall at rounding's size are as good as they get; these still move.
    if (wx.abs().amax(1) > UNSETTLED * total_x.abs().amax(1)).any():
        raise ConfigError(
            f"gradient: implicit did not settle in {MAX_SWEEPS} adjoint sweeps; raise epsilon, or use gradient=unrolled"
        )
    return total_x, total_y
