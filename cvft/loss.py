"""The weighted soft-margin triplet loss over all pairs of the global batch.

Shape letters: B pairs of the global batch, D descriptor values.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from cvft.config import LossConfig
from cvft.errors import TrainingError


class Loss(Protocol):
    """A training loss of the descriptors of one global batch, where row i of both views is a pair."""

    def __call__(self, ground: Tensor, aerial: Tensor, *, location_m: Tensor | None = None) -> Tensor:
        """Return the scalar loss of [B, D] descriptors, with the pairs' locations [B, 3] in metres."""
        ...


def build_loss(config: LossConfig) -> Loss:
    """Build the loss that the configuration names."""
    return SoftMarginTripletLoss(config)


class SoftMarginTripletLoss:
    """Mean of log(1 + exp(gamma * (d_positive - d_negative))) over all negatives, in both directions.

    d = 2 - 2 * cosine is the squared distance of unit vectors. Row i of the ground view has the negatives j != i of
    the aerial view and the other way round: 2 * B * (B - 1) terms. Source: Hu et al., CVM-Net (CVPR 2018), equation 3;
    Shi et al., CVFT (AAAI 2020).

    NOTE(paper): the official code also sums the diagonal's B constant terms log 2, while it divides by B * (B - 1).
    Its value is therefore ours plus log(2) / (B - 1), with the same gradient. Where negatives are masked we divide by
    those that are left.
    """

    def __init__(self, config: LossConfig) -> None:
        self.gamma = config.gamma
        self.mask_distance_m = config.mask_distance_m

    def __call__(self, ground: Tensor, aerial: Tensor, *, location_m: Tensor | None = None) -> Tensor:
        """Compute the loss in float32 or better, also under autocast.

        Args:
            ground: [B, D], L2-normalised.
            aerial: [B, D], L2-normalised; row i belongs to row i of `ground`.
            location_m: float64 [B, 3], see `Batch`; used with `mask_distance_m` alone. A pair whose location is NaN is
                never masked.

        Returns:
            Scalar.

        Raises:
            TrainingError: No negative is left to compare with.
        """
        with torch.autocast(ground.device.type, enabled=False):
            dtype = torch.promote_types(ground.dtype, torch.float32)
            distance = 2 - 2 * ground.to(dtype) @ aerial.to(dtype).T
            positive = distance.diagonal()
            excess = torch.stack([positive[:, None] - distance, positive[None, :] - distance])
            terms = functional.softplus(self.gamma * excess, threshold=40.0)  # the default of 20 cuts off 2e-9
            is_negative = self._negatives(len(ground), location_m, ground.device)
            # A mean over chosen entries would copy them; the sum of a masked product is the same and has a plain
            # gradient.
            return (terms * is_negative).sum() / (2 * is_negative.sum())

    def _negatives(self, num_pairs: int, location_m: Tensor | None, device: torch.device) -> Tensor:
        """Return bool [B, B]: which reference counts as a negative of which query."""
        if num_pairs < 2:
            raise TrainingError(f"a batch of {num_pairs} pair has no negatives; use a global batch of 2 pairs or more")
        is_negative = ~torch.eye(num_pairs, dtype=torch.bool, device=device)
        if self.mask_distance_m is None:
            return is_negative
        if location_m is None:
            raise TypeError("location_m is needed, because the loss masks negatives by their distance")
        # Subtracted before they are squared: the square of an earth-centred coordinate has lost the millimetres.
        squared = (location_m[:, None] - location_m[None, :]).square().sum(dim=-1)
        is_negative &= ~(squared < self.mask_distance_m**2)  # a comparison with NaN is false: unknown is never near
        if not is_negative.any():
            raise TrainingError(
                f"all {num_pairs} pairs of the batch lie within mask_distance_m={self.mask_distance_m} of each other,"
                " so no negative is left; use a larger global batch or a smaller mask_distance_m"
            )
        return is_negative
