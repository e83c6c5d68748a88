"""Sinkhorn in Triton, one program per sample: device code, loaded by `cvft.kernels.sinkhorn` where Triton is there.

The forward is stabilised scaling. After the first round, done in log space, the tile K = exp(logits + u + v) has exact
column sums, and a round is alpha = a / (K beta), then beta = b / (K^T alpha). No column step changes a potential by
more than the row step before it, because a logsumexp does not expand differences. So while the changes of the row steps
since K was made sum to less than MAX_CHANGE, no scaling can leave the number range; where they would not, the round is
done in log space and K made anew.

The backward reads the potentials of every round and makes each half-round's tile again, whose entries never exceed a
marginal: it is exact for the rounds that were done, whatever the costs.

Shape letters: n sources and m targets of one sample, padded to powers of two by lines that are not real.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, to be tested; settled when Triton is loaded
MAX_CHANGE = tl.constexpr(16.0)  # exp(2 * 16) times what float32 rounds to zero, 1e-38, is still nothing


@triton.jit
def _read_tile(
    values: tl.tensor,
    NUM_SOURCES: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    outside: tl.tensor,
    N: tl.constexpr,
    M: tl.constexpr,
) -> tl.tensor:
    """Read the tile [N, M] of this program's sample from contiguous `values` [B, n, m]."""
    i, j = tl.arange(0, N)[:, None], tl.arange(0, M)[None, :]
    start = tl.program_id(0).to(tl.int64) * NUM_SOURCES * NUM_TARGETS
    is_inside = (i < NUM_SOURCES) & (j < NUM_TARGETS)
    return tl.load(values + start + i * NUM_TARGETS + j, mask=is_inside, other=outside)


@triton.jit
def _write_tile(
    values: tl.tensor,
    tile: tl.tensor,
    NUM_SOURCES: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
) -> None:
    i, j = tl.arange(0, N)[:, None], tl.arange(0, M)[None, :]
    start = tl.program_id(0).to(tl.int64) * NUM_SOURCES * NUM_TARGETS
    is_inside = (i < NUM_SOURCES) & (j < NUM_TARGETS)
    tl.store(values + start + i * NUM_TARGETS + j, tile, mask=is_inside)


@triton.jit
def _read_line(
    values: tl.tensor, row: tl.tensor, LENGTH: tl.constexpr, outside: tl.tensor, SIZE: tl.constexpr
) -> tl.tensor:
    """Read row `row` of contiguous `values` [:, LENGTH] as a vector [SIZE]."""
    k = tl.arange(0, SIZE)
    return tl.load(values + row.to(tl.int64) * LENGTH + k, mask=k < LENGTH, other=outside)


@triton.jit
def _read_round(
    history_u: tl.tensor,
    history_v: tl.tensor,
    row: tl.tensor,
    NUM_SOURCES: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    u = _read_line(history_u, row, NUM_SOURCES, 0.0, N)
    return u, _read_line(history_v, row, NUM_TARGETS, 0.0, M)


@triton.jit
def _write_line(values: tl.tensor, line: tl.tensor, row: tl.tensor, LENGTH: tl.constexpr, SIZE: tl.constexpr) -> None:
    k = tl.arange(0, SIZE)
    tl.store(values + row.to(tl.int64) * LENGTH + k, line, mask=k < LENGTH)


@triton.jit
def _scale(cost: tl.tensor, scale_high: tl.tensor, scale_low: tl.tensor) -> tl.tensor:
    """Return 1 / epsilon in the type of `cost`; Triton takes numbers in float32, so the rest comes apart."""
    return tl.full((), 0.0, cost.dtype.element_ty) + scale_high + scale_low


@triton.jit
def _log_step(logits: tl.tensor, marginal: tl.tensor, is_real: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """Return the potentials with which exp(logits) has the sums `marginal` over AXIS."""
    peak = tl.where(is_real, tl.max(logits, AXIS), 0.0)
    total = tl.where(is_real, tl.sum(tl.exp(logits - tl.expand_dims(peak, AXIS)), AXIS), marginal)
    return tl.log(marginal / total) - peak


@triton.jit
def _log_round(
    logits: tl.tensor, v: tl.tensor, a: tl.tensor, b: tl.tensor, is_source: tl.tensor, is_target: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Do a round in log space; return the potentials after it and the tile that absorbs them."""
    u = _log_step(logits + v[None, :], a, is_source, 1)
    v = _log_step(logits + u[:, None], b, is_target, 0)
    return u, v, tl.exp(logits + u[:, None] + v[None, :])


@triton.jit
def _row_step(
    cost: tl.tensor,
    a: tl.tensor,
    scale: tl.tensor,
    NUM_SOURCES: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Do the row step of round 1; return its logits [N, M] and the rows' shift in units of cost and over epsilon."""
    costs = _read_tile(cost, NUM_SOURCES, NUM_TARGETS, float("inf"), N, M)
    is_source = tl.arange(0, N) < NUM_SOURCES
    nearest = tl.where(is_source, tl.min(costs, 1), 0.0)
    logits = (nearest[:, None] - costs) * scale  # the digits of large costs are spent where the mass is
    shift = tl.log(a / tl.where(is_source, tl.sum(tl.exp(logits), 1), a))
    return logits + shift[:, None], nearest, shift


@triton.jit
def _first_round(
    cost: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    scale: tl.tensor,
    NUM_SOURCES: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Do round 1 in log space; return the logits of its plan, what `_row_step` shifted, and the columns' shift."""
    logits, nearest, shift_u = _row_step(cost, a, scale, NUM_SOURCES, NUM_TARGETS, N, M)
    is_target = tl.arange(0, M) < NUM_TARGETS
    peak = tl.where(is_target, tl.max(logits, 0), 0.0)
    logits = logits - peak[None, :]
    rest = tl.log(b / tl.where(is_target, tl.sum(tl.exp(logits), 0), b))
    return logits + rest[None, :], nearest, shift_u, rest - peak


@triton.jit(do_not_specialize=["num_rounds"])
def forward_kernel(
    cost: tl.tensor,
    source_marginals: tl.tensor,
    target_marginals: tl.tensor,
    plan: tl.tensor,
    potential_source: tl.tensor,
    potential_target: tl.tensor,
    error: tl.tensor,
    counts: tl.tensor,
    history_u: tl.tensor,
    history_v: tl.tensor,
    scale_high: tl.tensor,
    scale_low: tl.tensor,
    threshold: tl.tensor,
    num_rounds: tl.tensor,
    NUM_SOURCES: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    KEEP: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
) -> None:
    """Solve one sample; with KEEP, write the potentials after each round, relative to the first, for the backward."""
    sample = tl.program_id(0)
    is_source, is_target = tl.arange(0, N) < NUM_SOURCES, tl.arange(0, M) < NUM_TARGETS
    scale = _scale(cost, scale_high, scale_low)
    a = _read_line(source_marginals, sample, NUM_SOURCES, 1.0, N)
    b = _read_line(target_marginals, sample, NUM_TARGETS, 1.0, M)
    logits, nearest, shift_u, shift_v = _first_round(cost, a, b, scale, NUM_SOURCES, NUM_TARGETS, N, M)
    u, v = tl.zeros_like(a), tl.zeros_like(b)
    alpha, beta = u + 1, v + 1
    tile = tl.exp(logits)
    spent = tl.sum(u, 0)
    largest_error = spent + float("inf")
    num_done = tl.zeros((), tl.int32)
    is_running = num_done == 0
    while is_running:
        if KEEP:
            row = sample.to(tl.int64) * num_rounds + num_done
            _write_line(history_u, u + tl.log(alpha), row, NUM_SOURCES, N)
            _write_line(history_v, v + tl.log(beta), row, NUM_TARGETS, M)
        num_done += 1
        rows = tl.where(is_source, tl.sum(tile * beta[None, :], 1), a)
        ratio = rows * alpha / a
        if (num_done >= num_rounds) | (threshold >= 0):  # else nobody looks, and each look makes the warps wait
            largest_error = tl.max(tl.abs(ratio - 1), 0)
        is_running = (num_done < num_rounds) & ~(largest_error <= threshold)  # NaN runs on
        if is_running:
            spent += tl.max(tl.abs(tl.log(ratio)), 0)
            if spent > MAX_CHANGE:
                u, v, tile = _log_round(logits, v + tl.log(beta), a, b, is_source, is_target)
                alpha, beta, spent = tl.zeros_like(a) + 1, tl.zeros_like(b) + 1, tl.zeros_like(spent)
            else:
                alpha = a / rows
                beta = b / tl.where(is_target, tl.sum(tile * alpha[:, None], 0), b)
    _write_tile(plan, tile * alpha[:, None] * beta[None, :], NUM_SOURCES, NUM_TARGETS, N, M)
    _write_line(potential_source, nearest + (shift_u + (u + tl.log(alpha))) / scale, sample, NUM_SOURCES, N)
    _write_line(potential_target, (shift_v + (v + tl.log(beta))) / scale, sample, NUM_TARGETS, M)
    tl.store(error + sample, largest_error)
    tl.store(counts + sample, num_done.to(tl.int64))


@triton.jit(do_not_specialize=["num_rounds"])
def backward_kernel(
    cost: tl.tensor,
    source_marginals: tl.tensor,
    target_marginals: tl.tensor,
    counts: tl.tensor,
    history_u: tl.tensor,
    history_v: tl.tensor,
    grad_plan: tl.tensor,
    grad_source: tl.tensor,
    grad_target: tl.tensor,
    grad_cost: tl.tensor,
    grad_a: tl.tensor,
    grad_b: tl.tensor,
    scale_high: tl.tensor,
    scale_low: tl.tensor,
    num_rounds: tl.tensor,
    NUM_SOURCES: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
) -> None:
    """Go back through the rounds of one sample; x and y are the adjoints of u and v over the marginals."""
    # A column step takes y to x -= K y, with K the tile after it; a row step takes x to y = -K^T x, likewise.
    sample = tl.program_id(0)
    scale = _scale(cost, scale_high, scale_low)
    a = _read_line(source_marginals, sample, NUM_SOURCES, 1.0, N)
    b = _read_line(target_marginals, sample, NUM_TARGETS, 1.0, M)
    logits, _, _, _ = _first_round(cost, a, b, scale, NUM_SOURCES, NUM_TARGETS, N, M)
    first = sample.to(tl.int64) * num_rounds
    last = first + tl.load(counts + sample) - 1
    u, v = _read_round(history_u, history_v, last, NUM_SOURCES, NUM_TARGETS, N, M)
    gradient = _read_tile(grad_plan, NUM_SOURCES, NUM_TARGETS, 0.0, N, M) * tl.exp(logits + u[:, None] + v[None, :])
    x = tl.sum(gradient, 1) + _read_line(grad_source, sample, NUM_SOURCES, 0.0, N) / scale
    y = (tl.sum(gradient, 0) + _read_line(grad_target, sample, NUM_TARGETS, 0.0, M) / scale) / b
    sum_x, sum_y = tl.zeros_like(x), tl.zeros_like(y)
    row, before = last, tl.maximum(last - 1, first)
    u_before, v_before = _read_round(history_u, history_v, before, NUM_SOURCES, NUM_TARGETS, N, M)
    while row > first:
        # Read two rounds ahead, since nothing of this round waits for it.
        before = tl.maximum(row - 2, first)
        u_next, v_next = _read_round(history_u, history_v, before, NUM_SOURCES, NUM_TARGETS, N, M)
        step = tl.exp(logits + u[:, None] + v[None, :]) * y[None, :]
        gradient -= step
        x = (x - tl.sum(step, 1)) / a
        sum_x, sum_y = sum_x + x, sum_y + y
        step = tl.exp(logits + u[:, None] + v_before[None, :]) * x[:, None]
        gradient -= step
        y = -tl.sum(step, 0) / b
        x = tl.zeros_like(x)
        u, v, u_before, v_before = u_before, v_before, u_next, v_next
        row -= 1
    step = tl.exp(logits) * y[None, :]
    x = (x - tl.sum(step, 1)) / a
    logits, _, _ = _row_step(cost, a, scale, NUM_SOURCES, NUM_TARGETS, N, M)
    gradient = gradient - step - tl.exp(logits) * x[:, None]
    _write_tile(grad_cost, gradient * -scale, NUM_SOURCES, NUM_TARGETS, N, M)
    _write_line(grad_a, sum_x + x, sample, NUM_SOURCES, N)
    _write_line(grad_b, sum_y + y, sample, NUM_TARGETS, M)
