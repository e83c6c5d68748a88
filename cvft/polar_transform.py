"""The polar transform: the aerial image unrolled around the camera, so that its columns are bearings as a panorama's.

Source: Shi et al., "Spatial-Aware Feature Aggregation for Image based Cross-View Geo-Localization" (NeurIPS 2019),
section 3.1. Theirs counts pixels by their corners; here, as everywhere in this project, pixel i covers [i, i + 1).
North is in the middle of the width, east right of it, as in the panoramas of CVUSA and CVACT and as the paper's own
code has it. The upper rows are far from the camera, the last row is next to it.

Shape letters: B images, C channels, H x W aerial, h x w unrolled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PolarTransform(nn.Module):
    """Unrolls aerial images by bilinear interpolation; without parameters and without state."""

    grid: Tensor

    def __init__(self, size_px: tuple[int, int]) -> None:
        """Lay out the places to sample.

        Args:
            size_px: Rows h and columns w of the result.
        """
        super().__init__()
        self.register_buffer("grid", _sampling_grid(size_px), persistent=False)

    def forward(self, aerial: Tensor) -> Tensor:
        """Return [B, C, h, w] of aerial images [B, C, H, W], north up, with the camera in the middle.

        The weights of a sample sum to one, so that it makes no difference whether pixels are normalised before or
        after. In memory the channels stay last.
        """
        grid = self.grid.to(aerial.dtype).expand(len(aerial), -1, -1, -1)
        unrolled = functional.grid_sample(aerial, grid, padding_mode="border", align_corners=False)
        return unrolled.contiguous(memory_format=torch.channels_last)


def _sampling_grid(size_px: tuple[int, int]) -> Tensor:
    """Return float32 [1, h, w, 2]: right and down of the middle, both in halves of the aerial image's sides.

    A column at azimuth a (clockwise from north) and a row at distance t (1 at the edge) is sampled at (t sin a,
    -t cos a).
    """
    height, width = size_px
    azimuth = ((torch.arange(width, dtype=torch.float64) + 0.5) / width - 0.5) * (2 * torch.pi)
    distance = 1 - (torch.arange(height, dtype=torch.float64) + 0.5) / height
    right, down = distance[:, None] * azimuth.sin(), -distance[:, None] * azimuth.cos()
    return torch.stack([right, down], dim=2)[None].float()
