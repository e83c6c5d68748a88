import math

import pytest
import torch

from cvft.config import TransportConfig
from cvft.feature_transport import FeatureTransport

CHANNELS, GRID = 5, (3, 4)
NUM_POSITIONS = GRID[0] * GRID[1]


def layer(**config):
    torch.manual_seed(0)
    return FeatureTransport(TransportConfig(**config), channels=CHANNELS, grid=GRID)


def features(num_images=2):
    return torch.rand(num_images, CHANNELS, *GRID, generator=torch.Generator().manual_seed(1))


def silence(transport):
    """Leave the bias alone to make the cost."""
    torch.nn.init.zeros_(transport.score.weight)
    return transport


def test_features_are_moved_from_rows_to_columns_of_the_plan():
    transport = layer(init="zero")
    given = features()
    plan = transport.transport(given).plan
    flat = given.flatten(2)
    expected = torch.zeros_like(flat)
    for source in range(NUM_POSITIONS):
        for target in range(NUM_POSITIONS):
            expected[:, :, target] += flat[:, :, source] * plan[:, source, target, None]
    torch.testing.assert_close(transport(given).flatten(2), expected)


def test_a_cost_that_forbids_all_but_one_shift_shifts_the_features():
    transport = silence(layer(init="zero"))
    shift = torch.eye(NUM_POSITIONS).roll(1, dims=1)  # position i to i + 1, the last to the first
    with torch.no_grad():
        transport.cost.bias.copy_((1 - shift).flatten())
    given = features()
    torch.testing.assert_close(transport(given).flatten(2), given.flatten(2).roll(1, dims=2))


def test_soft_starts_with_half_of_each_mass_in_place():
    plan = silence(layer(init="soft")).transport(features()).plan
    torch.testing.assert_close(plan.diagonal(dim1=1, dim2=2), torch.full((2, NUM_POSITIONS), 0.5))
    other = 0.5 / (NUM_POSITIONS - 1)
    torch.testing.assert_close(plan, torch.eye(NUM_POSITIONS).expand_as(plan) * (0.5 - other) + other)


def test_zero_starts_with_the_uniform_plan():
    plan = silence(layer(init="zero")).transport(features()).plan
    torch.testing.assert_close(plan, torch.full_like(plan, 1 / NUM_POSITIONS))


def test_identity_starts_with_staying_in_place_forbidden():
    plan = silence(layer(init="identity")).transport(features()).plan
    assert plan.diagonal(dim1=1, dim2=2).max() < 1e-40
    off = plan[:, ~torch.eye(NUM_POSITIONS, dtype=torch.bool)]
    torch.testing.assert_close(off, torch.full_like(off, 1 / (NUM_POSITIONS - 1)))


def mass_in_place_after_training(init):
    """Train towards the plan that stays: its gain is the mean of the diagonal."""
    transport = layer(init=init)
    optimizer = torch.optim.Adam(transport.parameters(), lr=1e-3)
    for _ in range(30):
        loss = -transport.transport(features()).plan.diagonal(dim1=1, dim2=2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return -loss.item()


def test_identity_cannot_learn_to_stay_in_place_while_zero_and_soft_can():
    assert mass_in_place_after_training("identity") < 1e-6
    assert mass_in_place_after_training("zero") > 0.9
    assert mass_in_place_after_training("soft") > 0.9


def test_the_score_is_alive_at_every_position_for_every_seed():
    for seed in range(20):
        torch.manual_seed(seed)
        transport = FeatureTransport(TransportConfig(), channels=64, grid=GRID)
        scores = transport.score(torch.relu(torch.randn(2, 64, *GRID)))
        assert scores.min() > 0


def test_cost_weights_start_within_two_deviations_of_zero():
    weight = layer().cost.weight
    assert weight.abs().max() <= 0.01
    assert 0.003 < weight.std() < 0.006


def test_a_learned_epsilon_starts_as_the_fixed_one_and_gives_the_plan_of_what_it_became():
    fixed, learned = layer(init="zero"), layer(init="zero", is_epsilon_learned=True)
    assert set(learned.state_dict()) - set(fixed.state_dict()) == {"log_epsilon"}
    given = features()
    assert torch.equal(learned.transport(given).plan, fixed.transport(given).plan)
    with torch.no_grad():
        learned.log_epsilon.fill_(math.log(0.03))
    warmer = layer(init="zero", epsilon=0.03).transport(given).plan
    torch.testing.assert_close(learned.transport(given).plan, warmer, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_learned_epsilon_is_numerically_right():
    transport = layer(init="zero", is_epsilon_learned=True, solver="log")
    weights = torch.randn(2, NUM_POSITIONS, NUM_POSITIONS, generator=torch.Generator().manual_seed(2))

    def loss(log_epsilon):
        with torch.no_grad():
            transport.log_epsilon.fill_(log_epsilon)
        return (transport.transport(features()).plan.double() * weights).sum()

    start, step = math.log(0.01), 0.02
    numerical = (loss(start + step) - loss(start - step)).item() / (2 * step)
    loss(start).backward()
    assert transport.log_epsilon.grad.item() == pytest.approx(numerical, rel=0.01)
    assert abs(numerical) > 1e-3


@pytest.mark.parametrize("solver", ["scaling", "log"])
def test_gradients_reach_the_score_the_cost_and_the_features(solver):
    transport = layer(init="zero", solver=solver)
    given = features().requires_grad_()
    transport(given).square().sum().backward()
    for tensor in (transport.score.weight, transport.cost.weight, transport.cost.bias, given):
        assert tensor.grad.abs().max() > 0


def test_the_plan_is_the_same_under_bfloat16_autocast():
    transport = layer(init="zero")
    given = features()
    plan = transport.transport(given).plan
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transport.transport(given).plan, plan)
        assert transport(given).dtype == torch.float32
