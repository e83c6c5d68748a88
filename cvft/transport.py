"""Entropic optimal transport in batches: a problem, `solve`, a result.

The plan minimises <plan, cost> - epsilon * entropy(plan) among plans with the given row and column sums (Cuturi 2013,
"Sinkhorn distances"). With the default marginals on a square cost, rows and columns sum to one, and 20 rounds of rows,
then columns, are the transport of CVFT.

    result = solve(TransportProblem(cost=cost, epsilon=0.01))
    moved = result.plan.transpose(1, 2) @ features  # [B, m, C] from [B, n, C]

Shape letters: B problems, n sources, m targets.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from cvft.configuration import require
from cvft.errors import ConfigError
from cvft.kernels.sinkhorn import find_obstacle, solve_fused
from cvft.precision import full_precision
from cvft.sinkhorn import Solution, solve_log
from cvft.sinkhorn_implicit import ImplicitSolver
from cvft.sinkhorn_scaling import solve_scaling

Solver = Literal["auto", "scaling", "log", "triton"]
Gradient = Literal["unrolled", "implicit"]

CONVERGED_ERROR = 1e-3  # above it, the implicit gradient is wrong by several percent
MASS_TOLERANCE = 1e-5  # relative; float32 sums of a few thousand entries agree to this
_logger = logging.getLogger(__name__)

EMPTY_MASS = 1e-12  # of a mean marginal, in place of zero: a logarithm that stays finite, and no sum sees it


@dataclass(frozen=True, kw_only=True, eq=False)
class TransportProblem:
    """What is to be moved, and at what cost.

    Attributes:
        cost: Shape [B, n, m]; +inf forbids a pair. Below float32 it is raised to float32.
        epsilon: Entropic regularisation in units of cost; CVFT's factor of 100 on costs is 0.01.
        source_marginals: Mass of each source, shape [n] or [B, n], not negative; a zero is solved as 1e-12 of
            their mean. None is one each or, where only the target's are given, their mass spread evenly.
        target_marginals: Mass of each target, shape [m] or [B, m], not negative. None spreads the sources' mass evenly.
        check_marginals: Refuse marginals that cannot be transported. Without it the device is not waited for.

    Raises:
        ConfigError: A shape, a type or epsilon is unusable, a marginal is negative, or the two masses differ.
    """

    cost: Tensor
    epsilon: float
    source_marginals: Tensor | None = None
    target_marginals: Tensor | None = None
    check_marginals: bool = True

    def __post_init__(self) -> None:
        shape = list(self.cost.shape)
        require(
            len(shape) == 3 and min(shape[1:]) > 0, f"cost: shape {shape} must be [B, n, m] with n and m above zero"
        )
        require(self.cost.is_floating_point(), f"cost: {self.cost.dtype} must be a floating-point type")
        require(self.epsilon > 0, f"epsilon: {self.epsilon} must be positive")
        if not self.check_marginals:
            return
        _check_marginals("source_marginals", self.source_marginals, batch=shape[0], size=shape[1])
        _check_marginals("target_marginals", self.target_marginals, batch=shape[0], size=shape[2])
        if self.source_marginals is not None and self.target_marginals is not None:
            _check_masses(self.source_marginals, self.target_marginals)


@dataclass(frozen=True, kw_only=True, eq=False)
class TransportResult:
    """The plan and how far it got.

    Attributes:
        plan: Mass moved from source i to target j, shape [B, n, m], float32 (float64 for a float64 cost). Columns are
            exact; rows are off by `marginal_error`.
        potential_source: f [B, n] in units of cost; plan = exp((f + g - cost) / epsilon).
        potential_target: g [B, m] in units of cost.
        marginal_error: Largest difference of a row's sum from its marginal, relative to the marginal, shape [B];
            carries no gradient.
        num_iterations: Rounds done, int64 of shape [B].
        converged: Whether `marginal_error` is at most the threshold (1e-3 where none was given), shape [B].
        epsilon: As in the problem.
    """

    plan: Tensor
    potential_source: Tensor
    potential_target: Tensor
    marginal_error: Tensor
    num_iterations: Tensor
    converged: Tensor
    epsilon: float


def solve(
    problem: TransportProblem,
    *,
    num_iterations: int = 20,
    solver: Solver = "auto",
    gradient: Gradient = "unrolled",
    threshold: float | None = None,
    check_finite: bool = True,
) -> TransportResult:
    """Solve by Sinkhorn rounds, each rows first and then columns; autocast does not reach inside.

    Args:
        problem: Costs and marginals.
        num_iterations: Rounds at most.
        solver: `scaling` is fast and differentiable once; `triton` is the same in one kernel each way, for CUDA;
            `log` is the plain loop, for oracles and higher derivatives. `auto` takes `triton` wherever it can run, and
            `scaling` elsewhere.
        gradient: `unrolled` differentiates the rounds that were done, exactly: plan and potentials in cost and
            marginals. `implicit` takes the plan as converged: less memory, and the plan alone has a gradient.
        threshold: A sample's result is that of the first round that leaves its `marginal_error` at or below this,
            whatever the rest of the batch needs. None does all rounds.
        check_finite: Refuse costs that are not finite. Without it they end in a plan of NaN, and the device is not
            waited for.

    Raises:
        ConfigError: An option is unknown or out of range, `triton` is named where it cannot run, a cost is NaN or -inf,
            a row or column is forbidden altogether, or a gradient by `implicit` is wanted of a plan whose marginal
            error exceeds 1e-3.
    """
    require(solver in get_args(Solver), f"solver: {solver!r} must be one of {', '.join(get_args(Solver))}")
    require(gradient in get_args(Gradient), f"gradient: {gradient!r} must be one of {', '.join(get_args(Gradient))}")
    require(num_iterations >= 1, f"num_iterations: {num_iterations} must be at least 1")
    require(threshold is None or threshold > 0, f"threshold: {threshold} must be positive, or none for all rounds")
    options: dict[str, Any] = {"num_iterations": num_iterations, "threshold": threshold}
    with full_precision(problem.cost.device):
        solution = _run(problem, solver, gradient, options)
    if check_finite:
        _require_finite(solution)
    return TransportResult(
        plan=solution.plan,
        potential_source=solution.f,
        potential_target=solution.g,
        marginal_error=solution.error,
        num_iterations=solution.num_iterations,
        converged=solution.error <= (CONVERGED_ERROR if threshold is None else threshold),
        epsilon=problem.epsilon,
    )


def _run(problem: TransportProblem, solver: Solver, gradient: str, options: dict[str, Any]) -> Solution:
    cost = problem.cost.to(torch.promote_types(problem.cost.dtype, torch.float32))
    run = _choose(solver, cost)
    a, b = _marginals(problem, cost)
    if gradient == "unrolled":
        solution = run(cost, a, b, epsilon=problem.epsilon, **options)
    else:
        solution = Solution(*ImplicitSolver.apply(run, cost, a, b, problem.epsilon, options))  # type: ignore[no-untyped-call]
    if gradient == "implicit" and solution.plan.requires_grad and (solution.error > CONVERGED_ERROR).any():
        raise ConfigError(
            f"gradient: implicit needs a converged plan, but the marginal error is {solution.error.max():.3g}, above "
            f"{CONVERGED_ERROR}; raise num_iterations or epsilon, or use gradient=unrolled"
        )
    return solution


def _choose(solver: Solver, cost: Tensor) -> Callable[..., Solution]:
    if solver in ("scaling", "log"):
        return solve_scaling if solver == "scaling" else solve_log
    if solver == "auto" and not cost.is_cuda:
        return solve_scaling
    obstacle = find_obstacle(cost)
    if obstacle is None:
        return solve_fused
    if solver == "triton":
        raise ConfigError(f"solver: triton {obstacle}; use solver=auto, which takes what can run")
    _tell_once(f"transport by solver=scaling: the fused solver {obstacle}")
    return solve_scaling


@functools.cache
def _tell_once(message: str) -> None:
    _logger.warning("%s", message)


def _require_finite(solution: Solution) -> None:
    is_finite = solution.g.isfinite().all(1)  # whatever is wrong with a cost ends up in every target's potential
    if not is_finite.all():
        samples = (~is_finite).nonzero().flatten().tolist()
        raise ConfigError(f"cost: samples {samples} hold NaN, -inf, or a row or column of +inf alone; mend these costs")


def _marginals(problem: TransportProblem, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Return the marginals [B, n] and [B, m], given or by default, in the type of `cost` and without zeros."""
    batch, num_sources, num_targets = cost.shape
    a, b = problem.source_marginals, problem.target_marginals
    if a is None and b is None:  # nothing to check or to mend, and two launches
        ones = cost.new_ones(batch, num_sources)
        return ones, cost.new_full((batch, num_targets), num_sources / num_targets)
    if a is None:
        a = cast(Tensor, b).sum(-1, keepdim=True) / num_sources
    if b is None:
        b = a.sum(-1, keepdim=True) / num_targets
    return _positive(a.to(cost), (batch, num_sources)), _positive(b.to(cost), (batch, num_targets))


def _positive(marginals: Tensor, shape: tuple[int, int]) -> Tensor:
    floor = EMPTY_MASS * marginals.detach().mean(-1, keepdim=True)
    return torch.maximum(marginals, floor).expand(shape)


def _check_marginals(name: str, marginals: Tensor | None, *, batch: int, size: int) -> None:
    if marginals is None:
        return
    shape = tuple(marginals.shape)
    require(shape in ((size,), (batch, size)), f"{name}: shape {list(shape)} must be [{size}] or [{batch}, {size}]")
    smallest, largest = marginals.detach().double().aminmax()
    require(
        bool(smallest >= 0 and largest.isfinite()),
        f"{name}: from {smallest} to {largest}; must be finite and not negative",
    )
    require(bool((marginals.sum(-1) > 0).all()), f"{name}: a sample without any mass cannot be transported")


def _check_masses(a: Tensor, b: Tensor) -> None:
    masses = (a.detach().double().sum(-1), b.detach().double().sum(-1))
    source, target = torch.broadcast_tensors(*masses)  # type: ignore[no-untyped-call]
    excess = (source - target).abs() / target
    if (excess > MASS_TOLERANCE).any():
        worst = excess.argmax()
        raise ConfigError(
            f"source_marginals: their mass {source.flatten()[worst]:.6g} differs from the target's "
            f"{target.flatten()[worst]:.6g}; scale one of them, since balanced transport moves all mass"
        )
