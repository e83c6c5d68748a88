"""Plans against independent oracles, invariants, options and refusals of `cvft.transport`."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch

from cvft import sinkhorn_scaling
from cvft.errors import ConfigError
from cvft.transport import TransportProblem, TransportResult, solve

BOTH_SOLVERS = pytest.mark.parametrize("solver", ["scaling", "log"])


def make_cost(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_marginals(*shape: int, seed: int = 1) -> torch.Tensor:
    weights = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return weights / weights.sum(-1, keepdim=True)


def plain_plan(cost: torch.Tensor, epsilon: float, num_rounds: int) -> torch.Tensor:
    """The published loop on the tile itself, in numpy: nothing of it is shared with the package."""
    log_plan = cost.double().numpy() / -epsilon
    for _ in range(num_rounds):
        log_plan = log_plan - np.logaddexp.reduce(log_plan, axis=2, keepdims=True)
        log_plan = log_plan - np.logaddexp.reduce(log_plan, axis=1, keepdims=True)
    return torch.from_numpy(np.exp(log_plan))


def implied_plan(result: TransportResult, cost: torch.Tensor) -> torch.Tensor:
    exponent = result.potential_source.unsqueeze(2) + result.potential_target.unsqueeze(1) - cost
    return (exponent / result.epsilon).exp()


@BOTH_SOLVERS
@pytest.mark.parametrize("num_iterations", [1, 2, 20, 47])
def test_plan_is_the_plain_loops_round_by_round(solver, num_iterations):
    cost = make_cost(3, 9, 9)
    result = solve(TransportProblem(cost=cost, epsilon=0.1), num_iterations=num_iterations, solver=solver)
    torch.testing.assert_close(result.plan, plain_plan(cost, 0.1, num_iterations), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(implied_plan(result, cost), result.plan, rtol=1e-9, atol=1e-12)
    row_error = (result.plan.sum(2) - 1).abs().amax(1)
    torch.testing.assert_close(result.marginal_error, row_error, rtol=1e-9, atol=1e-12)
    assert result.num_iterations.tolist() == [num_iterations] * 3


@BOTH_SOLVERS
def test_converged_rectangular_plan_with_arbitrary_marginals_is_pots(solver):
    cost, a, b = make_cost(2, 7, 11), make_marginals(2, 7), make_marginals(11, seed=2)
    problem = TransportProblem(cost=cost, epsilon=0.2, source_marginals=a, target_marginals=b)
    result = solve(problem, num_iterations=5000, solver=solver, threshold=1e-12)
    for index in range(2):
        expected = ot.sinkhorn(
            a[index], b, cost[index], reg=0.2, method="sinkhorn_log", numItermax=10000, stopThr=1e-13
        )
        torch.testing.assert_close(result.plan[index], expected, rtol=1e-8, atol=1e-13)
    assert result.converged.all()


def test_both_solvers_agree_on_potentials():
    problem = TransportProblem(cost=make_cost(2, 5, 8), epsilon=0.05)
    fast, plain = solve(problem), solve(problem, solver="log")
    torch.testing.assert_close(fast.potential_source, plain.potential_source)
    torch.testing.assert_close(fast.potential_target, plain.potential_target)


@BOTH_SOLVERS
def test_default_marginals_share_the_sources_mass_evenly(solver):
    plan = solve(TransportProblem(cost=make_cost(2, 6, 4), epsilon=1.0), num_iterations=100, solver=solver).plan
    torch.testing.assert_close(plan.sum(2), torch.ones(2, 6, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.full((2, 4), 1.5, dtype=torch.float64))
    only_target = TransportProblem(cost=make_cost(1, 2, 3), epsilon=1.0, target_marginals=torch.tensor([1.0, 2, 5]))
    torch.testing.assert_close(
        solve(only_target, num_iterations=100).plan.sum(2), torch.full((1, 2), 4.0, dtype=torch.float64)
    )


@BOTH_SOLVERS
def test_a_source_without_mass_changes_nothing_for_the_others(solver):
    cost, b = make_cost(1, 6, 5), make_marginals(5)
    a = torch.cat([make_marginals(5), torch.zeros(1, dtype=torch.float64)])
    whole = TransportProblem(cost=cost, epsilon=0.3, source_marginals=a, target_marginals=b)
    part = TransportProblem(cost=cost[:, :5], epsilon=0.3, source_marginals=a[:5], target_marginals=b)
    plan = solve(whole, num_iterations=200, solver=solver).plan
    torch.testing.assert_close(plan[:, :5], solve(part, num_iterations=200, solver=solver).plan, rtol=1e-9, atol=1e-12)
    assert plan[:, 5].sum() < 1e-12


@BOTH_SOLVERS
def test_a_forbidden_pair_gets_no_mass(solver):
    cost = make_cost(1, 5, 5)
    cost[0, 2, 3] = math.inf
    result = solve(TransportProblem(cost=cost, epsilon=0.5), num_iterations=200, solver=solver)
    assert result.plan[0, 2, 3] == 0
    assert result.converged.all()


def test_columns_are_exact_after_any_number_of_rounds():
    cost = make_cost(4, 64, 64, dtype=torch.float32)
    for num_iterations in (1, 3, 20):
        plan = solve(TransportProblem(cost=cost, epsilon=0.01), num_iterations=num_iterations).plan
        torch.testing.assert_close(plan.sum(1), torch.ones(4, 64), rtol=0, atol=2e-6)
        torch.testing.assert_close(plan.sum((1, 2)), torch.full((4,), 64.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 1, 1), (3, 8, 1), (3, 1, 8)], ids=["constant", "sample", "row", "column"]
)
def test_converged_plan_is_unmoved_by_an_additive_cost(shape):
    cost = make_cost(3, 8, 8)
    options = {"num_iterations": 3000, "threshold": 1e-12}
    plan = solve(TransportProblem(cost=cost, epsilon=0.2), **options).plan
    moved = solve(TransportProblem(cost=cost + 5 * make_cost(*shape, seed=3), epsilon=0.2), **options).plan
    torch.testing.assert_close(moved, plan, rtol=1e-8, atol=1e-12)


def test_plan_follows_a_permutation_of_sources_and_targets():
    cost = make_cost(2, 6, 6)
    rows, columns = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([1, 5, 0, 2, 4, 3])
    plan = solve(TransportProblem(cost=cost, epsilon=0.1)).plan
    permuted = solve(TransportProblem(cost=cost[:, rows][:, :, columns], epsilon=0.1)).plan
    torch.testing.assert_close(permuted, plan[:, rows][:, :, columns])


@BOTH_SOLVERS
def test_each_sample_stops_by_itself(solver):
    cost = torch.stack([make_cost(6, 6) * scale for scale in (0.1, 1.0, 3.0, 30.0)])
    problem = TransportProblem(cost=cost, epsilon=0.5)
    result = solve(problem, num_iterations=60, solver=solver, threshold=1e-4)
    counts = result.num_iterations.tolist()
    assert counts == sorted(set(counts))
    assert counts[-1] == 60
    assert result.converged.tolist() == [True, True, True, False]
    assert ((result.marginal_error <= 1e-4) == result.converged).all()
    for index, count in enumerate(counts):
        alone = TransportProblem(cost=cost[index : index + 1], epsilon=0.5)
        torch.testing.assert_close(solve(alone, num_iterations=count, solver=solver).plan[0], result.plan[index])
        if 1 < count < 60:
            assert solve(alone, num_iterations=count - 1, solver=solver).marginal_error > 1e-4


@pytest.mark.parametrize(
    "limits",
    [{"MAX_BLOCK_ROUNDS": 3}, {"MAX_SCALING": 1.05}, {"MAX_SCALING": 3.0, "CHUNK_ENTRIES": 200}, {"CHUNK_ENTRIES": 1}],
    ids=str,
)
@pytest.mark.parametrize("threshold", [None, 1e-3])
def test_result_does_not_depend_on_blocks_absorption_or_chunks(monkeypatch, limits, threshold):
    problem = TransportProblem(cost=make_cost(5, 9, 7), epsilon=0.2)
    usual = solve(problem, num_iterations=40, threshold=threshold)
    for name, value in limits.items():
        monkeypatch.setattr(sinkhorn_scaling, name, value)
    cut = solve(problem, num_iterations=40, threshold=threshold)
    torch.testing.assert_close(cut.plan, usual.plan)
    torch.testing.assert_close(cut.potential_target, usual.potential_target)
    assert cut.num_iterations.tolist() == usual.num_iterations.tolist()


def test_an_empty_batch_gives_an_empty_plan():
    assert solve(TransportProblem(cost=torch.zeros(0, 4, 5), epsilon=0.1)).plan.shape == (0, 4, 5)


def test_masses_that_differ_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"mass 3 differs from the target's 4\.5"):
        TransportProblem(
            cost=torch.zeros(1, 3, 3), epsilon=1.0, source_marginals=torch.ones(3), target_marginals=torch.ones(3) * 1.5
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cost": torch.zeros(3, 3)}, r"cost: shape \[3, 3\]"),
        ({"cost": torch.zeros(1, 3, 3, dtype=torch.int32)}, "cost: torch.int32"),
        ({"epsilon": 0.0}, "epsilon: 0.0"),
        ({"source_marginals": torch.ones(4)}, r"source_marginals: shape \[4\] must be \[3\] or \[1, 3\]"),
        ({"target_marginals": torch.tensor([1.0, -1.0, 1.0])}, "target_marginals: from -1.0"),
        ({"target_marginals": torch.tensor([1.0, math.nan, 1.0])}, "target_marginals: from nan"),
        ({"source_marginals": torch.zeros(3)}, "source_marginals: a sample without any mass"),
    ],
)
def test_unusable_problems_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TransportProblem(**({"cost": torch.zeros(1, 3, 3), "epsilon": 1.0} | changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iterations": 0}, "num_iterations: 0"),
        ({"solver": "newton"}, "solver: 'newton'"),
        ({"gradient": "none"}, "gradient: 'none'"),
        ({"threshold": 0.0}, r"threshold: 0\.0"),
    ],
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        solve(TransportProblem(cost=torch.zeros(1, 3, 3), epsilon=1.0), **options)


@BOTH_SOLVERS
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_cost_without_meaning_is_named_by_its_sample(solver, bad):
    cost = make_cost(4, 5, 5, dtype=torch.float32)
    cost[2, 1, 1] = bad
    with pytest.raises(ConfigError, match=r"cost: samples \[2\] hold NaN"):
        solve(TransportProblem(cost=cost, epsilon=0.1), solver=solver)


@BOTH_SOLVERS
@pytest.mark.parametrize("where", [(0, slice(None)), (slice(None), 0)], ids=["row", "column"])
def test_a_wholly_forbidden_row_or_column_is_refused(solver, where):
    cost = make_cost(2, 5, 5)
    cost[1][where] = math.inf
    with pytest.raises(ConfigError, match=r"cost: samples \[1\]"):
        solve(TransportProblem(cost=cost, epsilon=0.1), solver=solver)
