"""The fused solver against float64 autograd through the plain loop: on CUDA where there is one, else interpreted.

Triton decides when it is loaded whether it interprets: `test_kernels.py` runs this file in a process of its own with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch

from cvft.config import TransportConfig
from cvft.errors import ConfigError
from cvft.feature_transport import FeatureTransport
from cvft.transport import TransportProblem, solve

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)
if not (IS_INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs CUDA; test_kernels.py runs it in Triton's interpreter", allow_module_level=True)

MEETS_NAN = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in which Triton interprets


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def draw_marginals(*shape: int, seed: int = 1) -> torch.Tensor:
    weights = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE) + 0.1
    return weights / weights.sum(-1, keepdim=True)


def solve_with_gradients(solver, cost, *, epsilon=0.01, marginals=(None, None), plan_alone=False, **options):
    """Everything that `solve` gives, and the gradients of a fixed random loss of plan and potentials."""
    cost = cost.detach().requires_grad_()
    a, b = (None if marginal is None else marginal.detach().requires_grad_() for marginal in marginals)
    problem = TransportProblem(cost=cost, epsilon=epsilon, source_marginals=a, target_marginals=b)
    result = solve(problem, solver=solver, **options)
    loss = (result.plan * draw(*cost.shape, seed=9).to(cost.dtype)).sum()
    if not plan_alone:
        loss = loss + (result.potential_source * draw(*result.potential_source.shape, seed=10).to(cost.dtype)).sum()
        loss = loss + (result.potential_target * draw(*result.potential_target.shape, seed=11).to(cost.dtype)).sum()
    loss.backward()
    return result, [value.grad for value in (cost, a, b) if value is not None]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).abs().max() / expected.abs().max())


def assert_same(solved, expected, *, rtol=1e-8, atol=1e-11):
    (result, gradients), (expected_result, expected_gradients) = solved, expected
    for name in ("plan", "potential_source", "potential_target", "marginal_error"):
        torch.testing.assert_close(getattr(result, name), getattr(expected_result, name), rtol=rtol, atol=atol)
    assert result.num_iterations.tolist() == expected_result.num_iterations.tolist()
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("shape", "num_iterations"),
    [((1, 1, 1), 3), ((2, 5, 1), 2), ((2, 1, 6), 2), ((3, 9, 9), 1), ((2, 20, 64), 2), ((1, 80, 64), 20)],
    ids=str,
)
def test_plan_potentials_and_gradients_are_the_plain_loops_for_any_sizes_and_marginals(shape, num_iterations):
    marginals = (draw_marginals(shape[0], shape[1]), draw_marginals(shape[0], shape[2], seed=2))
    options = {"epsilon": 0.1, "marginals": marginals, "num_iterations": num_iterations}
    cost = draw(*shape)
    assert_same(solve_with_gradients("triton", cost, **options), solve_with_gradients("log", cost, **options))


@pytest.mark.parametrize("num_iterations", [1, 2, 9])
def test_gradient_along_random_directions_is_numerically_right(num_iterations):
    def outputs(cost, a, b):
        problem = TransportProblem(cost=cost, epsilon=0.4, source_marginals=a, target_marginals=b)
        result = solve(problem, num_iterations=num_iterations, solver="triton")
        return result.plan, result.potential_source, result.potential_target

    inputs = [value.requires_grad_() for value in (draw(2, 3, 4), draw_marginals(2, 3), draw_marginals(2, 4, seed=2))]
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)


@pytest.mark.parametrize("rms", [0.3, 3.0, 30.0])
def test_float32_is_float64s_plain_loop_to_1e_5_over_cvfts_range(rms):
    features, weights = draw(2, 64, seed=1) * rms, draw(64, 4096, seed=2) * 0.005
    cost = (features @ weights).view(2, 64, 64).float()
    fused, (gradient,) = solve_with_gradients("triton", cost, plan_alone=True)
    expected, (expected_gradient,) = solve_with_gradients("log", cost.double(), plan_alone=True)
    assert fused.plan.dtype == gradient.dtype == torch.float32
    assert relative_error(fused.plan, expected.plan) < 5e-6
    assert relative_error(gradient, expected_gradient) < 1e-5


@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_logits_of_thousands_give_finite_and_close_results(scale, offset):
    offsets = draw(2, 1, 32, seed=4) * offset + draw(2, 32, 1, seed=5) * offset
    cost = (draw(2, 32, 32) * scale + offsets).float()
    fused, (gradient,) = solve_with_gradients("triton", cost, plan_alone=True)
    expected, (expected_gradient,) = solve_with_gradients("log", cost.double(), plan_alone=True)
    assert gradient.isfinite().all()
    assert relative_error(fused.plan, expected.plan) < 1e-3
    assert (gradient - expected_gradient).abs().max() < 1e-3 * max(expected_gradient.abs().max(), 1.0)
    torch.testing.assert_close(fused.plan.sum(1), torch.ones(2, 32, device=DEVICE), rtol=0, atol=2e-6)


@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_the_published_identity_cost_spreads_each_mass_over_the_others(factor):
    cost = factor * torch.eye(64, device=DEVICE).expand(1, 64, 64)
    fused, (gradient,) = solve_with_gradients("triton", cost, plan_alone=True)
    off_diagonal = (1 - torch.eye(64, device=DEVICE)) / 63
    torch.testing.assert_close(fused.plan, off_diagonal.expand(1, 64, 64), rtol=1e-5, atol=1e-9)
    assert (gradient.diagonal(dim1=1, dim2=2) == 0).all()


@pytest.mark.skipif(not IS_INTERPRETED, reason="compiled code keeps its constants")
@pytest.mark.parametrize("max_change", [0.0, 1e9])
def test_rounds_in_log_space_and_by_scaling_are_the_same_rounds(monkeypatch, max_change):
    options = {"epsilon": 0.1, "marginals": (draw_marginals(2, 7), draw_marginals(2, 5, seed=2)), "num_iterations": 8}
    cost = draw(2, 7, 5)
    usual = solve_with_gradients("triton", cost, **options)
    device_code = importlib.import_module("cvft.kernels.sinkhorn_triton")
    monkeypatch.setattr(device_code, "MAX_CHANGE", device_code.tl.constexpr(max_change))
    assert_same(solve_with_gradients("triton", cost, **options), usual)


def test_each_sample_stops_by_itself_with_the_gradient_of_the_rounds_it_did():
    cost = torch.stack([draw(6, 6) * scale for scale in (0.1, 1.0, 30.0)])
    options = {"epsilon": 0.5, "num_iterations": 60, "threshold": 1e-4}
    fused = solve_with_gradients("triton", cost, **options)
    assert len(set(fused[0].num_iterations.tolist())) == 3
    assert fused[0].converged.tolist() == [True, True, False]
    assert_same(fused, solve_with_gradients("log", cost, **options))


def test_a_sample_has_the_same_bits_alone_and_in_any_batch():
    cost = draw(3, 9, 12).float()
    together, (gradient,) = solve_with_gradients("triton", cost, epsilon=0.1, num_iterations=5, plan_alone=True)
    loss_weights = draw(3, 9, 12, seed=9).float()
    for index in range(3):
        alone = cost[index : index + 1].clone().requires_grad_()
        plan = solve(TransportProblem(cost=alone, epsilon=0.1), num_iterations=5, solver="triton").plan
        (plan * loss_weights[index]).sum().backward()
        assert torch.equal(plan[0], together.plan[index])
        assert torch.equal(alone.grad[0], gradient[index])


def test_strided_costs_marginals_and_gradients_are_read_where_they_lie():
    cost, a, b = draw(2, 12, 9).transpose(1, 2), draw_marginals(9), draw_marginals(2, 24, seed=2)[:, ::2]
    b = b / b.sum(1, keepdim=True)
    weights = draw(2, 12, 9, seed=3).transpose(1, 2)
    gradients = []
    for solver in ("triton", "log"):
        given = [value.detach().requires_grad_() for value in (cost, a, b)]
        problem = TransportProblem(cost=given[0], epsilon=0.2, source_marginals=given[1], target_marginals=given[2])
        solve(problem, num_iterations=5, solver=solver).plan.backward(weights)
        gradients.append([value.grad for value in given])
    for fused, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-8, atol=1e-11)


def test_forbidden_pairs_and_massless_sources_get_no_mass_and_a_finite_gradient():
    cost, a, b = draw(1, 6, 5).float(), draw_marginals(6).float(), draw_marginals(5, seed=2).float()
    cost[0, 2, 3] = math.inf
    a[4] = 0
    a /= a.sum()
    options = {"epsilon": 0.3, "marginals": (a, b), "plan_alone": True}
    fused, (gradient, grad_a, _) = solve_with_gradients("triton", cost, **options)
    assert fused.plan[0, 2, 3] == 0
    assert fused.plan[0, 4].sum() < 1e-11
    assert gradient.isfinite().all()
    assert grad_a.isfinite().all()
    torch.testing.assert_close(fused.plan, solve_with_gradients("log", cost, **options)[0].plan, rtol=1e-4, atol=1e-6)


@MEETS_NAN
@pytest.mark.parametrize("where", [(0, slice(None)), (slice(None), 0)], ids=["row", "column"])
def test_a_wholly_forbidden_row_or_column_is_named_by_its_sample(where):
    cost = draw(2, 5, 5).float()
    cost[1][where] = math.inf
    with pytest.raises(ConfigError, match=r"cost: samples \[1\]"):
        solve(TransportProblem(cost=cost, epsilon=0.1), solver="triton")


@MEETS_NAN
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_cost_without_meaning_is_named_by_its_sample(bad):
    cost = draw(4, 5, 5).float()
    cost[2, 1, 1] = bad
    with pytest.raises(ConfigError, match=r"cost: samples \[2\] hold NaN"):
        solve(TransportProblem(cost=cost, epsilon=0.1), solver="triton")


def test_an_empty_batch_no_rounds_and_costs_that_are_too_large():
    empty = TransportProblem(cost=draw(0, 4, 5), epsilon=0.1)
    assert solve(empty, solver="triton").plan.shape == (0, 4, 5)
    with pytest.raises(ConfigError, match="num_iterations: 0"):
        solve(empty, solver="triton", num_iterations=0)
    large = TransportProblem(cost=torch.zeros(1, 65, 128, device=DEVICE), epsilon=0.1)
    assert solve(large, solver="triton", num_iterations=1).plan.shape == (1, 65, 128)
    with pytest.raises(ConfigError, match=r"solver: triton holds 128 x 128 costs of \[65, 128\] in registers"):
        solve(TransportProblem(cost=large.cost.double(), epsilon=0.1), solver="triton")


def test_bfloat16_costs_are_solved_in_float32_and_second_derivatives_refused():
    cost = draw(1, 8, 8).bfloat16().requires_grad_()
    plan = solve(TransportProblem(cost=cost, epsilon=1.0), num_iterations=2, solver="triton").plan
    assert plan.dtype == torch.float32
    (first,) = torch.autograd.grad(plan.square().sum(), cost, create_graph=True)
    assert first.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_implicit_gradient_of_a_converged_plan_is_the_unrolled_one():
    options = {"epsilon": 0.5, "num_iterations": 60, "plan_alone": True}
    cost = draw(2, 6, 9)
    implicit, (gradient,) = solve_with_gradients("triton", cost, gradient="implicit", **options)
    _, (unrolled,) = solve_with_gradients("log", cost, **options)
    assert implicit.converged.all()
    torch.testing.assert_close(gradient, unrolled, rtol=1e-6, atol=1e-8)


def test_the_transport_layer_gives_the_same_features_and_gradients_by_either_solver():
    features = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    outcomes = []
    for solver in ("triton", "scaling"):
        torch.manual_seed(0)
        layer = FeatureTransport(TransportConfig(init="zero", solver=solver), channels=5, grid=(3, 4)).to(DEVICE)
        moved = layer(features)
        (moved * draw(*moved.shape).float()).sum().backward()
        outcomes.append([moved.detach(), *(parameter.grad for parameter in layer.parameters())])
    for fused, eager in zip(*outcomes, strict=True):
        assert relative_error(fused, eager) < 1e-4
