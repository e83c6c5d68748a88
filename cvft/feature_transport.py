"""The feature transport layer of CVFT (Shi et al., AAAI 2020, section "Cross-view Feature Transport").

Shape letters: B images, C channels, h x w map, n = h * w positions in row-major order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvft.config import TransportConfig
from cvft.precision import at_least_float32, full_precision
from cvft.transport import TransportProblem, TransportResult, solve

_WEIGHT_STD = 0.005


class FeatureTransport(nn.Module):
    """Move the features of the ground image to where the aerial image has them.

    A 1x1 convolution scores each position; from the n scores one fully connected layer makes the whole cost of moving
    position i to position o. Entropic transport turns the cost into a plan whose rows and columns sum to one. The cost
    depends on the ground image alone, so that both views can be embedded apart and the aerial side indexed ahead.
    """

    def __init__(self, config: TransportConfig, *, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config = config
        num_positions = grid[0] * grid[1]
        self.score = nn.Conv2d(channels, 1, kernel_size=1)
        self.cost = nn.Linear(num_positions, num_positions * num_positions)
        self.log_epsilon = nn.Parameter(torch.tensor(math.log(config.epsilon))) if config.is_epsilon_learned else None
        self._initialise(num_positions)

    def forward(self, features: Tensor) -> Tensor:
        """Return the moved features [B, C, h, w] of features [B, C, h, w], in float32 or better.

        Raises:
            ConfigError: The gradient is `implicit` and the plan has not converged.
        """
        plan = self.transport(features).plan
        with full_precision(features.device):
            return torch.bmm(at_least_float32(features).flatten(2), plan).reshape(features.shape)

    def transport(self, features: Tensor) -> TransportResult:
        """Return the transport whose plan [B, n, n] moves position i (row) of [B, C, h, w] to position o (column).

        The whole way from the scores to the plan stays in float32: bfloat16 sums leave the rows 20 % off, and TF32 in
        the scores moves the plan by 2e-3. Features that are not finite give a plan of NaN, so that the
        loss, which every rank sees, tells of them.

        Raises:
            ConfigError: The gradient is `implicit` and the plan has not converged.
        """
        with full_precision(features.device):
            # A 1x1 convolution, said as a product: cuDNN's convolutions have a TF32 switch of their own.
            positions = at_least_float32(features).flatten(2).transpose(1, 2)
            weight = self.score.weight.flatten(1)
            scores = functional.relu(functional.linear(positions, weight, self.score.bias)).squeeze(2)
            num_positions = scores.shape[1]
            cost = self.cost(scores).reshape(-1, num_positions, num_positions)
            epsilon = self.config.epsilon
            if self.log_epsilon is not None:
                # The plan depends on cost over epsilon alone; potentials stay in units of this cost.
                cost = cost * (math.log(epsilon) - self.log_epsilon).exp()
            return solve(
                TransportProblem(cost=cost, epsilon=epsilon),
                num_iterations=self.config.num_iterations,
                solver=self.config.solver,
                gradient=self.config.gradient,
                check_finite=False,
            )

    def _initialise(self, num_positions: int) -> None:
        # NOTE(paper) The published bias is the identity, as a *cost*: staying in place starts forbidden, with mass
        # exp(-1 / epsilon) whose gradient is zero in float32. Kept as published; `zero` and `soft` are the ways out.
        diagonal = {
            "identity": 1.0,
            "zero": 0.0,
            # exp(-diagonal / epsilon) = n - 1 weighs as much as the other n - 1 columns: half of each mass stays.
            "soft": -self.config.epsilon * math.log(max(num_positions - 1, 1)),
        }[self.config.init]
        with torch.no_grad():
            # NOTE(paper) Features are not negative: with score weights of both signs, one draw in six leaves the ReLU
            # dead at nearly every position, and the plan never learns. Positive ones as small as the cost's keep 20
            # rounds a good solve.
            nn.init.trunc_normal_(self.score.weight, std=_WEIGHT_STD, a=-2 * _WEIGHT_STD, b=2 * _WEIGHT_STD).abs_()
            nn.init.zeros_(self.score.bias)  # type: ignore[arg-type]  # typed optional, made here with bias
            nn.init.trunc_normal_(self.cost.weight, std=_WEIGHT_STD, a=-2 * _WEIGHT_STD, b=2 * _WEIGHT_STD)
            self.cost.bias.copy_((diagonal * torch.eye(num_positions)).flatten())
