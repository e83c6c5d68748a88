"""The training losses, over all pairs of the global batch: every other pair is a negative.

Both need a few [B, B] tables in float32: 4 MB each at B=1,024.

Shape letters: B pairs of the global batch, D descriptor values.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvft.config import LossConfig
from cvft.errors import TrainingError
from cvft.precision import full_precision

MAX_LOGIT_SCALE = 100.0


class Loss(nn.Module, ABC):
    """A training loss of the descriptors of one global batch, where row i of both views is a pair.

    What it learns is a parameter of the module, and belongs into the optimizer and the checkpoint. Every rank computes
    it from the same gathered descriptors, so that its parameters get the same, whole gradient everywhere.
    """

    @abstractmethod
    def forward(self, ground: Tensor, aerial: Tensor, *, location_m: Tensor | None = None) -> Tensor:
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

    def clamp_parameters(self) -> None:
        """Put the loss's own parameters back into their range; to be called after every step of the optimizer."""


def build_loss(config: LossConfig) -> Loss:
    """Build the loss that the configuration names."""
    return InfoNCELoss(config) if config.kind == "info_nce" else SoftMarginTripletLoss(config)


class SoftMarginTripletLoss(Loss):
    """Mean of log(1 + exp(gamma * (d_positive - d_negative))) over all negatives, in both directions.

    d = 2 - 2 * cosine is the squared distance of unit vectors. Row i of the ground view has the negatives j != i of
    the aerial view and the other way round: 2 * B * (B - 1) terms. Source: Hu et al., CVM-Net (CVPR 2018), equation 3;
    Shi et al., CVFT (AAAI 2020).

    NOTE(paper): the official code also sums the diagonal's B constant terms log 2, while it divides by B * (B - 1).
    Its value is therefore ours plus log(2) / (B - 1), with the same gradient. Where negatives are masked we divide by
    those that are left.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.gamma = config.gamma
        self.mask_distance_m = config.mask_distance_m

    def forward(self, ground: Tensor, aerial: Tensor, *, location_m: Tensor | None = None) -> Tensor:
        """See `Loss.forward`."""
        with full_precision(ground.device):
            dtype = torch.promote_types(ground.dtype, torch.float32)
            distance = 2 - 2 * ground.to(dtype) @ aerial.to(dtype).T
            positive = distance.diagonal()
            excess = torch.stack([positive[:, None] - distance, positive[None, :] - distance])
            terms = functional.softplus(self.gamma * excess, threshold=40.0)  # the default of 20 cuts off 2e-9
            is_negative = _negatives(len(ground), location_m, self.mask_distance_m, ground.device)
            # A mean over chosen entries would copy them; the sum of a masked product is the same and has a plain
            # gradient.
            return (terms * is_negative).sum() / (2 * is_negative.sum())


class InfoNCELoss(Loss):
    """Cross entropy of finding the pair's other view among the batch, by scaled cosines, averaged over both directions.

    The scale is learned as its logarithm, from 1 / `temperature` on, and kept within 1 and 100. A negative nearer than
    `mask_distance_m` is left out of the softmax, and label smoothing spreads its share evenly over the references that
    are left, the true one among them. Source: Radford et al., CLIP (ICML 2021), figure 3 and section 2.5; Deuser et
    al., Sample4Geo (ICCV 2023), section 3.1.

    Attributes:
        log_scale: Scalar parameter, the logarithm of what the cosines are multiplied with.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        self.label_smoothing = config.label_smoothing
        self.mask_distance_m = config.mask_distance_m

    def forward(self, ground: Tensor, aerial: Tensor, *, location_m: Tensor | None = None) -> Tensor:
        """See `Loss.forward`."""
        with full_precision(ground.device):
            dtype = torch.promote_types(ground.dtype, torch.float32)
            logits = self.log_scale.to(dtype).exp() * (ground.to(dtype) @ aerial.to(dtype).T)
            is_negative = _negatives(len(ground), location_m, self.mask_distance_m, ground.device)
            is_candidate = is_negative.fill_diagonal_(True)
            # The mask is symmetric, because distances are.
            return (self._direction(logits, is_candidate) + self._direction(logits.T, is_candidate)) / 2

    def _direction(self, logits: Tensor, is_candidate: Tensor) -> Tensor:
        """Return the mean smoothed cross entropy of the rows; row i is right at column i."""
        total = logits.masked_fill(~is_candidate, -math.inf).logsumexp(dim=1)
        # Minus infinity times a weight of zero would be NaN, so the masked logits are zeroed before they are averaged.
        mean = (logits * is_candidate).sum(dim=1) / is_candidate.sum(dim=1)
        return (total - (1 - self.label_smoothing) * logits.diagonal() - self.label_smoothing * mean).mean()

    @torch.no_grad()
    def clamp_parameters(self) -> None:
        """Keep the scale within 1 and 100; clamped in the forward, it would have no gradient to come back by."""
        self.log_scale.clamp_(0.0, math.log(MAX_LOGIT_SCALE))


def _negatives(
    num_pairs: int, location_m: Tensor | None, mask_distance_m: float | None, device: torch.device
) -> Tensor:
    """Return bool [B, B]: which reference counts as a negative of which query."""
    if num_pairs < 2:
        raise TrainingError(f"a batch of {num_pairs} pair has no negatives; use a global batch of 2 pairs or more")
    is_negative = ~torch.eye(num_pairs, dtype=torch.bool, device=device)
    if mask_distance_m is None:
        return is_negative
    if location_m is None:
        raise TypeError("location_m is needed, because the loss masks negatives by their distance")
    # Subtracted before they are squared: the square of an earth-centred coordinate has lost the millimetres.
    squared = (location_m[:, None] - location_m[None, :]).square().sum(dim=-1)
    is_negative &= ~(squared < mask_distance_m**2)  # a comparison with NaN is false: unknown is never near
    if not is_negative.any():
        raise TrainingError(
            f"all {num_pairs} pairs of the batch lie within mask_distance_m={mask_distance_m} of each other,"
            " so no negative is left; use a larger global batch or a smaller mask_distance_m"
        )
    return is_negative
