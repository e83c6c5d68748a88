"""What follows a convolution: bias, ReLU, dropout, and the pool where nothing is trained.

On a GPU each is a pass over memory of its own, and a convolution in bfloat16 takes hardly longer than reading and
writing its result; so they are one kernel in Triton, where that can run. The backward needs the output alone, which the
next convolution keeps anyway: where it is above zero, a value was neither cut off nor dropped. `torch.compile` gets the
plain operations and fuses them itself.

Shape letters: B images, C channels, H x W map.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cvft.kernels.sinkhorn import triton_obstacle
from cvft.noise import dropout, keep_mask, keep_threshold
from cvft.ops import max_pool

_BLOCK, _GROUP = 1024, 4  # positions and samples of one program


def convolve(
    convolution: nn.Conv2d, features: Tensor, *, probability: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """Return dropout(relu(convolution(features))).

    Args:
        convolution: With a bias.
        features: [B, C, H, W].
        probability: Of dropping a value, see `cvft.noise.dropout`.
        noise: int32 [B]; without it nothing is dropped.
    """
    if _is_fused(features, convolution):
        result, bias = _without_bias(convolution, features), convolution.bias
        return cast(Tensor, _Activation.apply(result, bias, probability, noise))  # type: ignore[no-untyped-call]
    return activate(convolution(features), probability=probability, noise=noise)


def convolve_and_pool(convolution: nn.Conv2d, features: Tensor, *, pooling: str) -> Tensor:
    """Return max_pool(relu(convolution(features))); `pooling` as in `cvft.ops.max_pool`."""
    if not torch.is_grad_enabled() and _is_fused(features, convolution):
        return _pool(_without_bias(convolution, features), cast(Tensor, convolution.bias), pooling)
    # The maximum first leaves a quarter for the ReLU to pass over, and the result is the same.
    return functional.relu(max_pool(convolution(features), pooling), inplace=True)


def activate(features: Tensor, *, probability: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """Return dropout(relu(features)), which may overwrite the features; arguments as in `convolve`."""
    if noise is None:
        return functional.relu(features, inplace=True)
    if torch.compiler.is_compiling():
        return dropout(functional.relu(features), probability, noise)
    return cast(Tensor, _Activation.apply(features, None, probability, noise))  # type: ignore[no-untyped-call]


class _Activation(torch.autograd.Function):
    """ReLU and dropout, written over the features; with a bias: bias too, and all in Triton."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, bias: Tensor | None, probability: float, noise: Tensor | None) -> Tensor:
        ctx.mark_dirty(features)
        ctx.scale = 1.0 if noise is None else 1 / (1 - probability)
        ctx.is_fused = bias is not None
        if bias is not None:
            _activate_fused(features, bias, probability, noise)
        elif noise is not None:
            mask = keep_mask(features, probability, noise)
            features.relu_().mul_(ctx.scale).masked_fill_(mask.logical_not_(), 0)
        ctx.save_for_backward(features)
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        if not ctx.is_fused:
            return torch.ops.aten.threshold_backward(gradients[0], output, 0).mul_(ctx.scale), None, None, None
        result = _gradient_fused(gradients[0], output, ctx.scale)
        # Summed in float32, as the parameter's own type.
        return result, result.sum((0, 2, 3), dtype=torch.float32) if ctx.needs_input_grad[1] else None, None, None


def _is_fused(features: Tensor, convolution: nn.Conv2d) -> bool:
    if torch.compiler.is_compiling() or triton_obstacle() is not None or features.dtype == torch.float64:
        return False
    tensors = features, convolution.weight
    are_channels_last = all(each.is_contiguous(memory_format=torch.channels_last) for each in tensors)
    return are_channels_last and (features.is_cuda or _device_code().IS_INTERPRETED)


def _without_bias(convolution: nn.Conv2d, features: Tensor) -> Tensor:
    padding = cast(tuple[int, int], convolution.padding)
    result = functional.conv2d(features, convolution.weight, None, convolution.stride, padding)
    return result.contiguous(memory_format=torch.channels_last)  # as it is already


def _activate_fused(features: Tensor, bias: Tensor, probability: float, noise: Tensor | None) -> None:
    num_samples, size = len(features), features[0].numel()
    options = {"CHANNELS": features.shape[1], "HAS_DROPOUT": noise is not None, "GROUP": _GROUP, "BLOCK": _BLOCK}
    numbers = keep_threshold(probability), 1 / (1 - probability), num_samples, size
    with torch.cuda.device_of(features):  # type: ignore[no-untyped-call]  # nothing on the CPU
        _device_code().activation_kernel[(-(-size // _BLOCK), -(-num_samples // _GROUP))](
            features, bias, bias if noise is None else noise, *numbers, **options
        )


def _gradient_fused(gradient: Tensor, output: Tensor, scale: float) -> Tensor:
    result = torch.empty_like(output)
    incoming = gradient.contiguous(memory_format=torch.channels_last)
    with torch.cuda.device_of(output):  # type: ignore[no-untyped-call]
        _device_code().gradient_kernel[(-(-output.numel() // _BLOCK),)](
            incoming, output, result, scale, output.numel(), BLOCK=_BLOCK
        )
    return result


def _pool(features: Tensor, bias: Tensor, pooling: str) -> Tensor:
    num_samples, channels, height, width = features.shape
    rows, columns = (-(-height // 2), -(-width // 2)) if pooling == "ceil" else (height // 2, width // 2)
    pooled = features.new_empty(num_samples, rows, columns, channels).permute(0, 3, 1, 2)
    size = rows * columns * channels
    with torch.cuda.device_of(features):  # type: ignore[no-untyped-call]
        _device_code().pool_kernel[(-(-size // _BLOCK), num_samples)](
            features, bias, pooled, height, width, columns, size, CHANNELS=channels, BLOCK=_BLOCK
        )
    return pooled


@functools.cache
def _device_code() -> ModuleType:
    return importlib.import_module("cvft.kernels.activation_triton")
