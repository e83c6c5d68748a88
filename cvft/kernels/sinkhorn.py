"""The fused solver of `cvft.transport`: forward and exact backward are one kernel each, with the tile in registers.

What is kept for the backward are the potentials after each round, [B, rounds, n + m] numbers, beside the cost itself.
Triton is loaded when the first problem is solved, so that nothing here needs it or waits for it elsewhere.

Shape letters: B problems, n sources, m targets.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import struct
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cvft.sinkhorn import Solution

MAX_TILE_BYTES = 128 * 128 * 4  # of a sample, padded to powers of two; more does not stay in registers
_BYTES_PER_WARP = 2048  # 16 numbers of float32 for each thread


def find_obstacle(cost: Tensor) -> str | None:
    """Say why the fused solver cannot take costs [B, n, m], as the end of a sentence; None where it can."""
    lacking = triton_obstacle()
    if lacking is not None:
        return lacking
    if not cost.is_cuda and not _device_code().IS_INTERPRETED:
        return f"runs on CUDA, not on {cost.device.type}"
    if cost.dtype not in (torch.float32, torch.float64):
        return f"computes in float32 or float64, not in {cost.dtype}"
    height, width = (_padded(size) for size in cost.shape[1:])
    if height * width * cost.element_size() > MAX_TILE_BYTES:
        return (
            f"holds {height} x {width} costs of {list(cost.shape[1:])} in registers, which is more than "
            f"{MAX_TILE_BYTES} bytes"
        )
    return None


def solve_fused(
    cost: Tensor, a: Tensor, b: Tensor, *, epsilon: float, num_iterations: int, threshold: float | None
) -> Solution:
    """Solve as `cvft.sinkhorn.solve_log` does, in one launch; differentiable once. `find_obstacle` must know of none.

    Args:
        cost: Shape [B, n, m].
        a: Positive source marginals, shape [B, n].
        b: Positive target marginals of the same mass, shape [B, m].
        epsilon: Entropic regularisation in units of cost.
        num_iterations: Rounds at most.
        threshold: A sample stops after the first round that leaves its row error at or below this; none does them all.
    """
    return Solution(*FusedSolver.apply(cost, a, b, epsilon, num_iterations, threshold))  # type: ignore[no-untyped-call]


class FusedSolver(torch.autograd.Function):
    """Solve in one kernel; differentiable once, in the cost and both marginals, exactly for the rounds done."""

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, a: Tensor, b: Tensor, epsilon: float, num_iterations: int, threshold: float | None
    ) -> tuple[Tensor, ...]:
        """Return the fields of a `Solution`; torch passes the arguments of `apply` by position."""
        cost, a, b = cost.contiguous(), a.contiguous(), b.contiguous()
        is_kept = any(ctx.needs_input_grad)
        history = [marginal.new_empty(len(cost), num_iterations * is_kept, marginal.shape[1]) for marginal in (a, b)]
        out = Solution(
            plan=torch.empty_like(cost),
            f=torch.empty_like(a),
            g=torch.empty_like(b),
            error=a.new_empty(len(a)),
            num_iterations=a.new_empty(len(a), dtype=torch.int64),
        )
        limits = (-1.0 if threshold is None else threshold, num_iterations)
        _launch("forward_kernel", cost, (a, b, *out, *history, *_scale(epsilon), *limits), KEEP=is_kept)
        ctx.epsilon = epsilon
        ctx.save_for_backward(cost, a, b, out.num_iterations, *history)
        ctx.mark_non_differentiable(out.error, out.num_iterations)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_plan: Tensor, grad_f: Tensor, grad_g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients in cost, a and b."""
        cost, a, b, counts, *history = ctx.saved_tensors
        incoming = [gradient.contiguous() for gradient in (grad_plan, grad_f, grad_g)]
        gradients = (torch.empty_like(cost), torch.empty_like(a), torch.empty_like(b))
        num_rounds = history[0].shape[1]
        _launch(
            "backward_kernel", cost, (a, b, counts, *history, *incoming, *gradients, *_scale(ctx.epsilon), num_rounds)
        )
        return *gradients, None, None, None


def _launch(name: str, cost: Tensor, arguments: tuple[Any, ...], **choices: bool) -> None:
    """Run a kernel of the device code, one program for each sample of `cost`."""
    if not len(cost):
        return
    height, width = (_padded(size) for size in cost.shape[1:])
    num_warps = min(max(height * width * cost.element_size() // _BYTES_PER_WARP, 1), 16)
    sizes = {"NUM_SOURCES": cost.shape[1], "NUM_TARGETS": cost.shape[2], "N": height, "M": width}
    with torch.cuda.device_of(cost):  # type: ignore[no-untyped-call]  # nothing on the CPU
        getattr(_device_code(), name)[(len(cost),)](cost, *arguments, **sizes, **choices, num_warps=num_warps)


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _scale(epsilon: float) -> tuple[float, float]:
    """Split 1 / epsilon into what float32 holds and the rest: Triton takes numbers in float32."""
    high = struct.unpack("f", struct.pack("f", 1 / epsilon))[0]
    return high, 1 / epsilon - high


@functools.cache
def triton_obstacle() -> str | None:
    """Say why no kernel of Triton can run here, as the end of a sentence; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None and not _device_code().IS_INTERPRETED:
        return "needs a C compiler for Triton's launcher, and neither gcc nor clang is on the PATH"
    return None


@functools.cache
def _device_code() -> ModuleType:
    return importlib.import_module("cvft.kernels.sinkhorn_triton")
