"""Sinkhorn in log space, the plain loop: what every solver returns, and the form the others are tested against.

Shape letters: B problems, n sources, m targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """Solved problems, as every solver returns them.

    Attributes:
        plan: Shape [B, n, m].
        f: Source potentials in units of cost, shape [B, n].
        g: Target potentials in units of cost, shape [B, m].
        error: Largest row error relative to the row's marginal, shape [B]; carries no gradient.
        num_iterations: Rounds after which the sample stopped, int64 of shape [B].
    """

    plan: Tensor
    f: Tensor
    g: Tensor
    error: Tensor
    num_iterations: Tensor


def solve_log(
    cost: Tensor, a: Tensor, b: Tensor, *, epsilon: float, num_iterations: int, threshold: float | None
) -> Solution:
    """Solve by two logsumexp per round, rows first and then columns; autograd differentiates it any number of times.

    Args:
        cost: Shape [B, n, m].
        a: Positive source marginals, shape [B, n].
        b: Positive target marginals of the same mass, shape [B, m].
        epsilon: Entropic regularisation in units of cost.
        num_iterations: Rounds at most.
        threshold: A sample stops after the first round that leaves its row error at or below this; none does them all.
    """
    logits = cost / -epsilon
    log_a, log_b = a.log(), b.log()
    u, v = torch.zeros_like(a), torch.zeros_like(b)
    counts = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    is_running = torch.ones_like(counts, dtype=torch.bool)
    for _ in range(num_iterations):
        next_u = log_a - (logits + v.unsqueeze(1)).logsumexp(2)
        next_v = log_b - (logits + next_u.unsqueeze(2)).logsumexp(1)
        u = torch.where(is_running.unsqueeze(1), next_u, u)
        v = torch.where(is_running.unsqueeze(1), next_v, v)
        counts += is_running
        if threshold is not None:
            is_running = is_running & (_row_error(logits, u, v, a) > threshold)  # autograd keeps the old one
            if not is_running.any():
                break
    plan = (logits + u.unsqueeze(2) + v.unsqueeze(1)).exp()
    return Solution(plan, u * epsilon, v * epsilon, _row_error(logits, u, v, a), counts)


@torch.no_grad()
def _row_error(logits: Tensor, u: Tensor, v: Tensor, a: Tensor) -> Tensor:
    rows = (logits + u.unsqueeze(2) + v.unsqueeze(1)).exp().sum(2)
    return (rows / a - 1).abs().amax(1)
