"""What travels from the loader to the model: the pixels of a batch of pairs and where they come from.

Shape letters: B pairs, H rows, W columns, 3 channels in RGB order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        ground: uint8 [B, H, W, 3], RGB.
        aerial: uint8 [B, H, W, 3], RGB.
        index: int64 [B], row of each pair within its split in the manifest.
        location_m: float64 [B, 3], positions in metres whose straight distances are distances on the ground: either
            (easting, northing, 0) or earth-centred, one kind for the whole dataset; NaN where unknown.
        num_valid: Number of leading rows that count; the rest pads a last evaluation batch.
    """

    ground: Tensor
    aerial: Tensor
    index: Tensor
    location_m: Tensor
    num_valid: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; pinned host memory is copied without waiting."""
        return Batch(
            ground=self.ground.to(device, non_blocking=True),
            aerial=self.aerial.to(device, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            location_m=self.location_m.to(device, non_blocking=True),
            num_valid=self.num_valid,
        )
