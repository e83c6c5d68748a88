"""The three operations in which TensorFlow 1 differs from PyTorch: "SAME" convolution, pooling and bilinear resizing.

Shape letters: B images, C channels, H x W input map, h x w output map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class SameConv2d(nn.Conv2d):
    """A square convolution padded as TensorFlow's "SAME": the output has ceil(size / stride) rows and columns.

    Where the padding is odd, the extra row and column come *after* the map. A 3x3 kernel of stride 2 on an even size
    gets 0 before and 1 after, so its samples stand one pixel further than with PyTorch's symmetric padding of 1.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size=kernel_size, stride=stride)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve [B, C, H, W] into [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        kernel_px, stride_px = self.kernel_size[0], self.stride[0]
        top, bottom = _same_padding(features.shape[-2], kernel_px, stride_px)
        left, right = _same_padding(features.shape[-1], kernel_px, stride_px)
        if (top, left) == (bottom, right):
            return functional.conv2d(features, self.weight, self.bias, stride=stride_px, padding=(top, left))
        padded = functional.pad(features, (left, right, top, bottom))
        return functional.conv2d(padded, self.weight, self.bias, stride=stride_px)


class LegacyBilinearResize(nn.Module):
    """TensorFlow 1's `resize_bilinear`: source coordinate = output index * in / out, without half-pixel centres.

    Interpolating along one axis is a fixed matrix with at most two weights per row, so the whole resize is two small
    matrix products whose gradient is deterministic on every device.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("rows", _interpolation_matrix(source[0], target[0]), persistent=False)
        self.register_buffer("columns", _interpolation_matrix(source[1], target[1]).T.contiguous(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Resize [B, C, H, W] to [B, C, h, w]."""
        return torch.matmul(torch.matmul(self.rows.to(features.dtype), features), self.columns.to(features.dtype))


def max_pool(features: Tensor, pooling: str) -> Tensor:
    """Halve a map by 2x2 maxima; `pooling` "ceil" rounds odd sizes up as TensorFlow's "SAME", "floor" rounds down."""
    return functional.max_pool2d(features, kernel_size=2, ceil_mode=pooling == "ceil")


def pooled_size(size: tuple[int, int], num_pools: int, pooling: str) -> tuple[int, int]:
    """Return the rows and columns that `num_pools` calls of `max_pool` leave of `size`."""
    height, width = size
    for _ in range(num_pools):
        height, width = (-(-height // 2), -(-width // 2)) if pooling == "ceil" else (height // 2, width // 2)
    return height, width


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def legacy_coordinates(source: int, target: int) -> Tensor:
    """Return where along an axis of `source` samples `LegacyBilinearResize` reads its outputs, [target].

    A coordinate beyond the last sample reads the last sample.
    """
    return torch.arange(target, dtype=torch.float32) * (source / target)


def _interpolation_matrix(source: int, target: int) -> Tensor:
    """Return [target, source], row i holding the weights of the source samples that make output i."""
    coordinate = legacy_coordinates(source, target)
    lower = coordinate.floor().long()
    upper = (lower + 1).clamp(max=source - 1)
    weight = (coordinate - lower).unsqueeze(1)
    one_hot = torch.eye(source)
    return one_hot[lower] * (1 - weight) + one_hot[upper] * weight
