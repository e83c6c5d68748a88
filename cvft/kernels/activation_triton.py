"""Bias, ReLU, dropout and pooling in Triton: device code, loaded by `cvft.kernels.activation` where Triton is there.

All maps lie in memory with the channels last, so that position e of a sample is that of `cvft.noise.dropout`. NaN goes
through, so that the loss tells of it.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, to be tested; settled when Triton is loaded


@triton.jit
def _mix(words: tl.tensor) -> tl.tensor:
    """Hash uint32 words as `cvft.noise` does."""
    words = (words ^ (words >> 16)) * 0x7FEB352D
    words = (words ^ (words >> 15)) * 0x846CA68B
    return words ^ (words >> 16)


@triton.jit
def activation_kernel(
    values: tl.tensor,
    bias: tl.tensor,
    noise: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    num_samples: tl.tensor,
    size: tl.tensor,
    CHANNELS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Overwrite some positions of GROUP samples, each of `size` values; the positions' hashes are made once for all."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = place < size
    shift = tl.load(bias + place % CHANNELS, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        word = place.to(tl.uint32) * 2
        factor, summand = _mix(word) | 1, _mix(word + 1)
    for k in range(GROUP):
        sample = tl.program_id(1) * GROUP + k
        if sample < num_samples:
            at = values + sample.to(tl.int64) * size + place
            value = tl.load(at, mask=is_inside, other=0.0).to(tl.float32) + shift
            value = tl.where(value < 0, 0.0, value)
            if HAS_DROPOUT:
                key = tl.load(noise + sample).to(tl.uint32, bitcast=True)
                drawn = (factor * key + summand).to(tl.int32, bitcast=True)
                value = tl.where(drawn >= threshold, value * scale, 0.0)
            tl.store(at, value.to(values.dtype.element_ty), mask=is_inside)


@triton.jit
def gradient_kernel(
    gradient: tl.tensor,
    output: tl.tensor,
    result: tl.tensor,
    scale: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Let the scaled gradient through where the output is above zero: there alone was neither ReLU nor dropout."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = place < size
    is_closed = tl.load(output + place, mask=is_inside, other=0.0) <= 0
    value = tl.load(gradient + place, mask=is_inside, other=0.0).to(tl.float32) * scale
    tl.store(result + place, tl.where(is_closed, 0.0, value).to(result.dtype.element_ty), mask=is_inside)


@triton.jit
def pool_kernel(
    values: tl.tensor,
    bias: tl.tensor,
    pooled: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    pooled_width: tl.tensor,
    pooled_size: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write ReLU(bias + the maximum of 2 x 2 values): the maximum may come first, because neither changes the order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = place < pooled_size
    channel, column, row = place % CHANNELS, place // CHANNELS % pooled_width, place // CHANNELS // pooled_width
    sample = tl.program_id(1).to(tl.int64)
    start = values + sample * height * width * CHANNELS + (row * 2 * width + column * 2) * CHANNELS + channel
    best = tl.load(start, mask=is_inside, other=0.0).to(tl.float32)
    has_right, has_below = column * 2 + 1 < width, row * 2 + 1 < height
    right = tl.load(start + CHANNELS, mask=is_inside & has_right, other=float("-inf")).to(tl.float32)
    below = tl.load(start + width * CHANNELS, mask=is_inside & has_below, other=float("-inf")).to(tl.float32)
    across = start + (width + 1) * CHANNELS
    last = tl.load(across, mask=is_inside & has_right & has_below, other=float("-inf")).to(tl.float32)
    best = tl.maximum(best, right, propagate_nan=tl.PropagateNan.ALL)
    best = tl.maximum(best, tl.maximum(below, last, propagate_nan=tl.PropagateNan.ALL), tl.PropagateNan.ALL)
    value = best + tl.load(bias + channel, mask=is_inside, other=0.0).to(tl.float32)
    value = tl.where(value < 0, 0.0, value)
    tl.store(pooled + sample * pooled_size + place, value.to(pooled.dtype.element_ty), mask=is_inside)
