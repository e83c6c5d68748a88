"""Gradients and number formats of `cvft.transport`; the oracle is autograd through the plain loop in float64."""

from __future__ import annotations

import pytest
import torch

from cvft import sinkhorn_scaling
from cvft.errors import ConfigError
from cvft.transport import TransportProblem, solve


def make_cost(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def gradient_of(cost: torch.Tensor, *, epsilon: float = 0.01, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan and gradient in the cost of a fixed random loss of the plan."""
    cost = cost.detach().requires_grad_()
    plan = solve(TransportProblem(cost=cost, epsilon=epsilon), **options).plan
    (plan * make_cost(*cost.shape, seed=9).to(plan.dtype)).sum().backward()
    return plan.detach(), cost.grad


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected entry."""
    return float((value.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("num_iterations", [1, 2, 9])
@pytest.mark.parametrize("limits", [{}, {"MAX_BLOCK_ROUNDS": 4}, {"MAX_SCALING": 1.05}], ids=str)
def test_gradient_of_plan_and_potentials_in_cost_and_marginals_is_numerically_right(
    monkeypatch, num_iterations, limits
):
    for name, value in limits.items():
        monkeypatch.setattr(sinkhorn_scaling, name, value)
    weights = [
        torch.rand(2, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) + 0.2 for size in (3, 4)
    ]
    a, b = (weight / weight.sum(1, keepdim=True) for weight in weights)

    def outputs(cost, a, b):
        problem = TransportProblem(cost=cost, epsilon=0.4, source_marginals=a, target_marginals=b)
        result = solve(problem, num_iterations=num_iterations)
        return result.plan, result.potential_source, result.potential_target

    assert torch.autograd.gradcheck(outputs, [value.requires_grad_() for value in (make_cost(2, 3, 4), a, b)])


@pytest.mark.parametrize("rms", [0.3, 1.0, 3.0, 10.0, 30.0])
def test_float32_gradient_is_float64_autograds_to_1e_5_over_cvfts_range(rms):
    features, weights = make_cost(4, 64, scale=rms, seed=1), make_cost(64, 4096, scale=0.005, seed=2)
    cost = (features @ weights).view(4, 64, 64).float()
    plan, gradient = gradient_of(cost)
    expected_plan, expected = gradient_of(cost.double(), solver="log")
    assert relative_error(plan, expected_plan) < 5e-6
    assert relative_error(gradient, expected) < 1e-5


@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_logits_of_thousands_give_finite_and_close_results(scale, offset):
    offsets = make_cost(3, 1, 32, scale=offset, seed=4) + make_cost(3, 32, 1, scale=offset, seed=5)
    cost = (make_cost(3, 32, 32, scale=scale) + offsets).float()
    plan, gradient = gradient_of(cost, num_iterations=50)
    expected_plan, expected = gradient_of(cost.double(), num_iterations=50, solver="log")
    assert plan.isfinite().all()
    assert gradient.isfinite().all()
    assert relative_error(plan, expected_plan) < 1e-3
    # The largest entries are of the order of 1 / epsilon = 100; a saturated plan has next to none to be relative to.
    assert (gradient - expected).abs().max() < 1e-3 * max(expected.abs().max(), 1.0)
    torch.testing.assert_close(plan.sum(1), torch.ones(3, 32), rtol=0, atol=2e-6)


def test_published_start_forbids_staying_and_float32_cannot_learn_it():
    identity = torch.eye(64).expand(2, 64, 64)
    plan, gradient = gradient_of(identity)
    off_diagonal = (1 - torch.eye(64)) / 63
    torch.testing.assert_close(plan, off_diagonal.expand(2, 64, 64), rtol=1e-5, atol=1e-9)
    assert (plan.diagonal(dim1=1, dim2=2) < 1e-40).all()
    assert (gradient.diagonal(dim1=1, dim2=2) == 0).all()
    exact, _ = gradient_of(identity.double(), solver="log")
    torch.testing.assert_close(exact[0, 0, 0], torch.tensor(5.9e-46, dtype=torch.float64), rtol=0.01, atol=0)
    _, gradient_at_zero = gradient_of(torch.zeros(2, 64, 64))
    assert (gradient_at_zero.diagonal(dim1=1, dim2=2) != 0).all()


def test_early_stop_keeps_the_gradient_exact_for_the_rounds_done():
    cost = torch.stack([make_cost(6, 6, scale=scale) for scale in (0.1, 1.0, 30.0)])
    _, gradient = gradient_of(cost, epsilon=0.5, num_iterations=60, threshold=1e-4)
    counts = solve(TransportProblem(cost=cost, epsilon=0.5), num_iterations=60, threshold=1e-4).num_iterations
    assert len(set(counts.tolist())) == 3
    _, by_autograd = gradient_of(cost, epsilon=0.5, num_iterations=60, threshold=1e-4, solver="log")
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-8, atol=1e-12)
    for index, count in enumerate(counts.tolist()):
        alone = cost[index].clone().requires_grad_()
        plan = solve(TransportProblem(cost=alone[None], epsilon=0.5), num_iterations=count, solver="log").plan
        (plan[0] * make_cost(3, 6, 6, seed=9)[index]).sum().backward()
        torch.testing.assert_close(gradient[index], alone.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_sources_and_targets_without_mass_leave_the_gradient_finite(gradient):
    cost = make_cost(2, 12, 16, scale=0.1).float().requires_grad_()
    a, b = torch.ones(12), torch.ones(16)
    a[:4], b[:8] = 0, 0
    problem = TransportProblem(cost=cost, epsilon=0.1, source_marginals=a, target_marginals=b)
    plan = solve(problem, num_iterations=100, gradient=gradient).plan
    (plan * make_cost(2, 12, 16, seed=9).float()).sum().backward()
    assert cost.grad.isfinite().all()
    others = cost.detach().double()[:, 4:, 8:].requires_grad_()
    plan = solve(TransportProblem(cost=others, epsilon=0.1), num_iterations=100).plan
    (plan * make_cost(2, 12, 16, seed=9)[:, 4:, 8:]).sum().backward()
    torch.testing.assert_close(cost.grad[:, 4:, 8:].double(), others.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["scaling", "log"])
def test_implicit_gradient_of_a_converged_plan_is_the_unrolled_one(solver):
    weights = [
        torch.rand(2, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) + 0.2 for size in (6, 9)
    ]
    gradients = []
    for gradient in ("implicit", "unrolled"):
        inputs = [make_cost(2, 6, 9), *(weight / weight.sum(1, keepdim=True) for weight in weights)]
        cost, a, b = (value.clone().requires_grad_() for value in inputs)
        problem = TransportProblem(cost=cost, epsilon=0.3, source_marginals=a, target_marginals=b)
        plan = solve(problem, num_iterations=1000, gradient=gradient, solver=solver).plan
        (plan * make_cost(2, 6, 9, seed=9)).sum().backward()
        # Only changes of the marginals that keep their mass have a meaning for a converged plan.
        gradients.append((cost.grad, a.grad - a.grad.mean(1, keepdim=True), b.grad - b.grad.mean(1, keepdim=True)))
    for implicit, unrolled in zip(*gradients, strict=True):
        torch.testing.assert_close(implicit, unrolled, rtol=1e-8, atol=1e-11)


def test_implicit_gradient_refuses_a_truncated_plan_with_its_error():
    cost = make_cost(2, 16, 16, scale=0.3).requires_grad_()
    problem = TransportProblem(cost=cost, epsilon=0.01)
    error = solve(problem).marginal_error.max()
    with pytest.raises(ConfigError, match=f"marginal error is {error:.3g}"):
        solve(problem, gradient="implicit")
    with torch.no_grad():
        torch.testing.assert_close(solve(problem, gradient="implicit").plan, solve(problem).plan)


def test_implicit_potentials_and_marginal_error_carry_no_gradient():
    cost = make_cost(1, 4, 4).requires_grad_()
    result = solve(TransportProblem(cost=cost, epsilon=1.0), num_iterations=50, gradient="implicit")
    assert result.plan.requires_grad
    assert not any(x.requires_grad for x in (result.potential_source, result.potential_target, result.marginal_error))
    assert not solve(TransportProblem(cost=cost, epsilon=1.0)).marginal_error.requires_grad


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_second_derivative_is_refused_by_scaling_and_given_by_log(gradient):
    cost = make_cost(1, 4, 4).requires_grad_()
    problem = TransportProblem(cost=cost, epsilon=1.0)
    (first,) = torch.autograd.grad(
        solve(problem, num_iterations=50, gradient=gradient).plan.square().sum(), cost, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    (first,) = torch.autograd.grad(solve(problem, solver="log").plan.square().sum(), cost, create_graph=True)
    first.square().sum().backward()
    assert cost.grad.abs().max() > 0


def test_autocast_and_short_matrix_formats_do_not_reach_inside():
    cost = make_cost(2, 16, 16, scale=0.1).float()
    plan, gradient = gradient_of(cost)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plan_inside, gradient_inside = gradient_of(cost)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert plan_inside.dtype == torch.float32
    assert torch.equal(plan_inside, plan)
    assert torch.equal(gradient_inside, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_costs_are_solved_in_float32(dtype):
    cost = make_cost(2, 8, 8, scale=0.1).to(dtype)
    plan, gradient = gradient_of(cost)
    assert plan.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(plan, gradient_of(cost.float())[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"threshold": 1e-3}, {"gradient": "implicit", "num_iterations": 500}], ids=str)
def test_a_gpu_gives_what_the_cpu_gives(options):
    cost = make_cost(8, 64, 64, scale=0.02).float()
    expected_plan, expected = gradient_of(cost.double(), **options)
    torch.set_float32_matmul_precision("high")
    try:
        plan, gradient = gradient_of(cost.cuda(), **options)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert relative_error(plan.cpu(), expected_plan) < 5e-6
    assert relative_error(gradient.cpu(), expected) < 1e-5
