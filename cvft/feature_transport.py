"""The feature transport layer of CVFT (Shi et al., AAAI 2020, section "Cross-view Feature Transport"), and variants.

The published layer has as many ground positions as aerial ones, one plan for all channels, and no part of the ground
that goes nowhere. `TransportConfig` names what else there is; each variant can be combined with every other.

Shape letters: B images, C channels, G groups of channels, h x w aerial grid, n ground positions, m = h * w aerial
positions, both in row-major order, k = m targets, and one more with a dustbin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvft.config import TransportConfig
from cvft.polar_prior import polar_terms, stretching
from cvft.precision import at_least_float32, full_precision
from cvft.transport import TransportProblem, TransportResult, solve

_WEIGHT_STD = 0.005


class FeatureTransport(nn.Module):
    """Move the features of the ground image to where the aerial image has them.

    A 1x1 convolution scores each position; from the n scores one fully connected layer makes the whole cost of moving
    position i to position o. Entropic transport turns the cost into a plan whose rows have mass one and whose columns
    share it evenly; what arrives is divided by the columns' mass, so that each moved feature is a mean. The cost
    depends on the ground image alone, so that both views can be embedded apart and the aerial side indexed ahead.

    Attributes:
        config: What the layer was built from.
        source_grid: Rows and columns of the ground positions.
        grid: Rows and columns of the aerial positions.
    """

    polar_terms: Tensor

    def __init__(
        self,
        config: TransportConfig,
        *,
        channels: int,
        grid: tuple[int, int],
        ground_map: tuple[int, int] | None = None,
    ) -> None:
        """Build the layer.

        Args:
            config: Which variant.
            channels: C, a multiple of `config.num_groups`.
            grid: h and w.
            ground_map: Rows and columns of the ground features before they are resized to the grid, which a
                rectangular layer does not need. None is the grid.
        """
        super().__init__()
        self.config, self.grid = config, grid
        ground_map = ground_map or grid
        self.source_grid = ground_map if config.is_rectangular else grid
        self._num_sources, self._num_cells = math.prod(self.source_grid), math.prod(grid)
        self._num_targets = self._num_cells + (config.dustbin_share > 0)
        groups = config.num_groups
        self.score = nn.Conv2d(channels, groups, kernel_size=1)
        self.cost = nn.Linear(self._num_sources, groups * self._num_sources * self._num_targets)
        self.log_epsilon = nn.Parameter(torch.tensor(math.log(config.epsilon))) if config.is_epsilon_learned else None
        self.polar_weight = self.dustbin_logit = None
        if config.polar_weight is not None:
            self.polar_weight = nn.Parameter(torch.full((groups, 2), config.polar_weight))
            terms = polar_terms(ground_map, self.source_grid, grid)
            self.register_buffer("polar_terms", terms, persistent=False)
        if config.dustbin_share > 0:
            self.dustbin_logit = nn.Parameter(torch.tensor(config.dustbin_share).logit())
        self._initialise()

    def forward(self, features: Tensor) -> Tensor:
        """Return the moved features [B, C, h, w] of features [B, C, *source_grid], in float32 or better.

        Raises:
            ConfigError: The gradient is `implicit` and the plan has not converged.
        """
        plan = self.transport(features).plan[:, :, : self._num_cells]
        with full_precision(features.device):
            groups = at_least_float32(features).flatten(2).reshape(len(plan), -1, self._num_sources)
            moved = torch.bmm(groups, plan).reshape(*features.shape[:2], *self.grid)
            mass = self._cell_mass()
            return moved if isinstance(mass, float) and mass == 1 else moved / mass

    def plan(self, features: Tensor) -> Tensor:
        """Return the plan [B, n, m] between ground and aerial positions, the mean over the groups, to be looked at.

        Its columns have equal masses, its rows mass one less what the dustbin took.
        """
        plan = self.transport(features).plan[:, :, : self._num_cells]
        return plan.reshape(-1, self.config.num_groups, *plan.shape[1:]).mean(1)

    def transport(self, features: Tensor) -> TransportResult:
        """Return the transport whose plan [B * G, n, k] moves position i (row) of an image to position o (column).

        The groups of an image follow each other; the dustbin, where there is one, is the last column.

        The whole way from the scores to the plan stays in float32: bfloat16 sums leave the rows 20 % off, and TF32 in
        the scores moves the plan by 2e-3. Features that are not finite give a plan of NaN, so that the
        loss, which every rank sees, tells of them.

        Raises:
            ConfigError: The gradient is `implicit` and the plan has not converged.
        """
        with full_precision(features.device):
            problem = TransportProblem(
                cost=self._cost(features),
                epsilon=self.config.epsilon,
                target_marginals=self._target_marginals(),
                check_marginals=False,
            )
            return solve(
                problem,
                num_iterations=self.config.num_iterations,
                solver=self.config.solver,
                gradient=self.config.gradient,
                check_finite=False,
            )

    def _cost(self, features: Tensor) -> Tensor:
        """Return the costs [B * G, n, k] of features [B, C, *source_grid]."""
        # A 1x1 convolution, said as a product: cuDNN's convolutions have a TF32 switch of their own.
        positions = at_least_float32(features).flatten(2).transpose(1, 2)
        scores = functional.relu(functional.linear(positions, self.score.weight.flatten(1), self.score.bias))
        groups = self.config.num_groups
        layers = zip(scores.unbind(2), self.cost.weight.chunk(groups), self.cost.bias.chunk(groups), strict=True)
        cost = torch.stack([functional.linear(*layer) for layer in layers], dim=1)
        cost = cost.reshape(-1, groups, self._num_sources, self._num_targets)
        epsilon = self.config.epsilon
        if self.polar_weight is not None:
            prior = torch.einsum("gt,tnm->gnm", epsilon * self.polar_weight, self.polar_terms)
            cost = cost + functional.pad(prior, (0, self._num_targets - self._num_cells))
        cost = cost.flatten(0, 1)
        if self.log_epsilon is not None:
            # The plan depends on cost over epsilon alone; potentials stay in units of this cost.
            cost = cost * (math.log(epsilon) - self.log_epsilon).exp()
        return cost

    def _cell_mass(self) -> float | Tensor:
        """Return the mass that arrives at each aerial position; a ground position has one."""
        evenly = self._num_sources / self._num_cells
        return evenly if self.dustbin_logit is None else evenly * torch.sigmoid(-self.dustbin_logit)

    def _target_marginals(self) -> Tensor | None:
        """Return the masses [k] of the targets; none means that they are even."""
        if self.dustbin_logit is None:
            return None
        dropped = self._num_sources * torch.sigmoid(self.dustbin_logit)
        return torch.cat([torch.as_tensor(self._cell_mass()).expand(self._num_cells), dropped.reshape(1)])

    def _initialise(self) -> None:
        with torch.no_grad():
            # NOTE(paper) Features are not negative: with score weights of both signs, one draw in six leaves the ReLU
            # dead at nearly every position, and the plan never learns. Positive ones as small as the cost's keep 20
            # rounds a good solve.
            nn.init.trunc_normal_(self.score.weight, std=_WEIGHT_STD, a=-2 * _WEIGHT_STD, b=2 * _WEIGHT_STD).abs_()
            nn.init.zeros_(self.score.bias)  # type: ignore[arg-type]  # typed optional, made here with bias
            nn.init.trunc_normal_(self.cost.weight, std=_WEIGHT_STD, a=-2 * _WEIGHT_STD, b=2 * _WEIGHT_STD)
            bias = functional.pad(self._first_cost(), (0, self._num_targets - self._num_cells))
            self.cost.bias.copy_(bias.flatten().repeat(self.config.num_groups))

    def _first_cost(self) -> Tensor:
        """Return the cost [n, m] before anything is learned, float64."""
        # NOTE(paper) The published bias is the identity, as a *cost*: staying in place starts forbidden, with mass
        # exp(-1 / epsilon) whose gradient is zero in float32. Kept as published; `zero` and `soft` are the ways out.
        if self.config.init == "identity":
            return torch.eye(self._num_cells, dtype=torch.float64)
        if self.config.init == "zero":
            return torch.zeros(self._num_sources, self._num_cells, dtype=torch.float64)
        # exp(-cost / epsilon) = 1 + (m - 2) * stretching: the uniform plan and one that stays, of about the same mass.
        kept = stretching(self.source_grid, self.grid) * max(self._num_cells - 2, 0)
        return -self.config.epsilon * torch.log1p(kept)
