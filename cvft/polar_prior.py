"""Where the positions of a panorama lie on the ground, as far as its own rows and columns can tell.

The convention is that of `cvft.polar_transform`, for north-aligned panoramas (CVUSA, CVACT): the middle column looks
north, columns to the right of it east, both edges south; the bottom row lies at the camera, which is the middle of the
aerial image, the top row at the border of that image, and rows between them at distances in proportion. Aerial images
show north up. Heights and the true size of the image do not enter: a position above the horizon is taken for far away.

Lengths are in halves of the aerial image's width. Shape letters: n ground positions, m aerial positions, row-major.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cvft.ops import legacy_coordinates


def centres(source: int, target: int) -> Tensor:
    """Return where the cells of an axis have their middle, as fractions of the axis, [target].

    Args:
        source: Samples of the map along the axis.
        target: Samples after `LegacyBilinearResize`, which does not keep cells in the middle; `source` for none.
    """
    return (legacy_coordinates(source, target).clamp(max=source - 1) + 0.5) / source


def polar_terms(ground_map: tuple[int, int], source_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return the two parts of the squared distance between each ground and each aerial position, [2, n, m].

    By the law of cosines it is the difference of the radii squared, (r - q)^2, here second, plus what the bearings add,
    2 r q (1 - cos(difference)), here first.

    Args:
        ground_map: Rows and columns of the panorama's features.
        source_grid: Rows and columns that they were resized to; `ground_map` for none.
        grid: Rows and columns of the aerial image's features.
    """
    rows, columns = (centres(*sizes) for sizes in zip(ground_map, source_grid, strict=True))
    radius, bearing = torch.meshgrid(1 - rows, (columns - 0.5) * 2 * math.pi, indexing="ij")
    down, right = torch.meshgrid(*(2 * centres(size, size) - 1 for size in grid), indexing="ij")
    radius, bearing = radius.reshape(-1, 1), bearing.reshape(-1, 1)
    aerial_radius, aerial_bearing = (part.reshape(1, -1) for part in (right.hypot(down), torch.atan2(right, -down)))
    by_bearing = 2 * radius * aerial_radius * (1 - (bearing - aerial_bearing).cos())
    return torch.stack([by_bearing, (radius - aerial_radius).square()])


def stretching(source_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return the plan that stretches one grid over the other: shares of each source's cell, float64 [n, m].

    Rows sum to one and columns to n / m; between equal grids it is the identity.
    """
    rows, columns = (_overlap(*sizes) for sizes in zip(source_grid, grid, strict=True))
    return torch.kron(rows, columns)


def _overlap(source: int, target: int) -> Tensor:
    """Return the share of each of `source` equal parts of an axis that lies in each of `target` others."""
    begin = torch.arange(source, dtype=torch.float64).unsqueeze(1) / source
    other = torch.arange(target, dtype=torch.float64) / target
    shared = torch.minimum(begin + 1 / source, other + 1 / target) - torch.maximum(begin, other)
    return shared.clamp(min=0) * source
