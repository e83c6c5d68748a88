"""Each variant of the feature transport does what it says, alone and together with the others."""

import ot
import pytest
import torch

from cvft.config import HeadConfig, TransportConfig
from cvft.configuration import parse
from cvft.errors import ConfigError
from cvft.feature_transport import FeatureTransport
from cvft.transport import TransportProblem, solve

CHANNELS, GRID, GROUND_MAP = 6, (4, 4), (3, 7)
NUM_CELLS, NUM_SOURCES = 16, 21

VARIANTS = {
    "published": {},
    "rectangular": {"is_rectangular": True},
    "groups": {"num_groups": 3},
    "polar": {"polar_weight": 8.0},
    "dustbin": {"dustbin_share": 0.3},
    "all": {
        "is_rectangular": True, "num_groups": 3, "polar_weight": 8.0, "dustbin_share": 0.3, "is_epsilon_learned": True,
    },
}  # fmt: skip
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def layer(*, seed=0, **config):
    torch.manual_seed(seed)
    settings = TransportConfig(**({"init": "zero", "epsilon": 0.1} | config))
    transport = FeatureTransport(settings, channels=CHANNELS, grid=GRID, ground_map=GROUND_MAP)
    with torch.no_grad():
        transport.cost.bias += 0.05 * torch.randn_like(transport.cost.bias)  # plans that are not nearly even
    return transport


def features(transport, num_images=2):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(num_images, CHANNELS, *transport.source_grid, generator=generator)


@EVERY_VARIANT
def test_moved_features_are_means_weighted_by_the_plan_of_their_group(variant):
    transport = layer(**variant)
    given = features(transport)
    plan = transport.transport(given).plan
    groups = transport.config.num_groups
    flat, moved = given.flatten(2), transport(given).flatten(2)
    for image in range(2):
        for channel in range(CHANNELS):
            weights = plan[image * groups + channel * groups // CHANNELS]
            for cell in range(NUM_CELLS):
                mean = (flat[image, channel] * weights[:, cell]).sum() / weights[:, cell].sum()
                torch.testing.assert_close(moved[image, channel, cell], mean)


@EVERY_VARIANT
def test_the_plan_is_pots_for_the_layers_cost_and_masses(variant):
    transport = layer(num_iterations=2000, **variant)
    given = features(transport, num_images=1)
    result = transport.transport(given)
    epsilon = 0.1
    num_sources = result.plan.shape[1]
    share = variant.get("dustbin_share", 0.0)
    b = torch.full((NUM_CELLS,), (1 - share) * num_sources / NUM_CELLS, dtype=torch.float64)
    if share:
        b = torch.cat([b, torch.tensor([share * num_sources], dtype=torch.float64)])
    for cost, plan in zip(transport._cost(given).detach().double(), result.plan.detach().double(), strict=True):
        a = torch.ones(num_sources, dtype=torch.float64)
        expected = ot.sinkhorn(a, b, cost, reg=epsilon, method="sinkhorn_log", numItermax=5000, stopThr=1e-12)
        torch.testing.assert_close(plan, expected, rtol=1e-3, atol=1e-5)


@EVERY_VARIANT
def test_gradients_by_the_fast_solver_are_those_through_the_plain_loop(variant):
    gradients = []
    for solver in ("scaling", "log"):
        transport = layer(solver=solver, **variant)
        given = features(transport).requires_grad_()
        weights = torch.randn(2, CHANNELS, *GRID, generator=torch.Generator().manual_seed(2))
        (transport(given) * weights).sum().backward()
        tensors = {"features": given, **dict(transport.named_parameters())}
        gradients.append({name: tensor.grad for name, tensor in tensors.items()})
    for name, expected in gradients[1].items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_rectangular_plan_leads_from_the_grounds_own_map():
    transport = layer(is_rectangular=True)
    assert transport.source_grid == GROUND_MAP
    plan = transport.plan(features(transport))
    assert plan.shape == (2, NUM_SOURCES, NUM_CELLS)
    torch.testing.assert_close(plan.sum(1), torch.full((2, NUM_CELLS), NUM_SOURCES / NUM_CELLS))


def test_soft_takes_half_of_each_mass_where_stretching_the_ground_map_takes_it():
    torch.manual_seed(0)
    settings = TransportConfig(init="soft", is_rectangular=True)
    transport = FeatureTransport(settings, channels=CHANNELS, grid=GRID, ground_map=GROUND_MAP)
    torch.nn.init.zeros_(transport.score.weight)
    plan = transport.plan(features(transport))[0]
    stretched = torch.zeros(NUM_SOURCES, NUM_CELLS)
    fine = (12, 28)  # cells of both grids hold whole numbers of these points
    for row in range(fine[0]):
        for column in range(fine[1]):
            source = row * GROUND_MAP[0] // fine[0] * GROUND_MAP[1] + column * GROUND_MAP[1] // fine[1]
            cell = row * GRID[0] // fine[0] * GRID[1] + column * GRID[1] // fine[1]
            stretched[source, cell] += NUM_SOURCES / (fine[0] * fine[1])
    kept = (NUM_CELLS - 2) / (2 * NUM_CELLS - 2)  # a half, less what the even part leaves in place by itself
    torch.testing.assert_close(plan, kept * stretched + (1 - kept) / NUM_CELLS)


def test_each_group_of_channels_is_moved_by_a_plan_of_its_own():
    whole = layer(num_groups=3)
    given = features(whole)
    moved = whole(given)
    for group in range(3):
        single = layer()
        with torch.no_grad():
            single.score.weight.copy_(whole.score.weight[group : group + 1])
            single.cost.weight.copy_(whole.cost.weight.chunk(3)[group])
            single.cost.bias.copy_(whole.cost.bias.chunk(3)[group])
        channels = slice(2 * group, 2 * group + 2)
        torch.testing.assert_close(moved[:, channels], single(given)[:, channels])
    moved[:, :2].square().sum().backward()
    assert [part.abs().max().item() > 0 for part in whole.cost.weight.grad.chunk(3)] == [True, False, False]


def test_the_dustbin_takes_its_share_and_the_sources_that_are_cheap_to_drop():
    transport = layer(dustbin_share=0.25, num_iterations=500)
    given = features(transport)
    plan = transport.transport(given).plan
    torch.testing.assert_close(plan[:, :, -1].sum(1), torch.full((2,), 0.25 * NUM_CELLS))
    with torch.no_grad():
        transport.cost.bias.view(NUM_CELLS, NUM_CELLS + 1)[:4, -1] -= 3.0  # the upper row of a 4 x 4 map
    dropped = transport.transport(given).plan[:, :, -1]
    torch.testing.assert_close(dropped[:, :4], torch.ones(2, 4), rtol=0, atol=1e-2)
    assert transport.plan(given)[:, :4].max() < 1e-3


def test_the_dustbins_share_is_learned_from_what_has_no_counterpart():
    transport = layer(dustbin_share=0.25, num_iterations=100)
    optimizer = torch.optim.Adam(transport.parameters(), lr=0.03)
    given = torch.ones(1, CHANNELS, *GRID)
    given[:, :, :2] = -1.0  # half of the ground is wrong wherever it goes
    for _ in range(60):
        loss = -transport(given).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < -0.99
    assert transport.plan(given)[:, :8].max() < 1e-3
    assert 0.45 < torch.sigmoid(transport.dustbin_logit) < 0.5


def test_the_gradient_in_a_learned_share_is_numerically_right():
    def loss(logit):
        b = torch.cat(
            [torch.sigmoid(-logit) * torch.full((3,), 5 / 3, dtype=logit.dtype), 5 * torch.sigmoid(logit).reshape(1)]
        )
        cost = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        problem = TransportProblem(cost=cost, epsilon=0.3, target_marginals=b, check_marginals=False)
        return solve(problem).plan[:, :, :3].square() / b[:3]

    assert torch.autograd.gradcheck(loss, torch.tensor(-0.7, dtype=torch.float64, requires_grad=True))


def test_without_a_variant_the_layer_has_the_published_tensors_alone():
    torch.manual_seed(0)
    transport = FeatureTransport(TransportConfig(), channels=CHANNELS, grid=GRID, ground_map=GROUND_MAP)
    shapes = {name: tuple(tensor.shape) for name, tensor in transport.state_dict().items()}
    assert shapes == {
        "score.weight": (1, CHANNELS, 1, 1), "score.bias": (1,), "cost.weight": (256, 16), "cost.bias": (256,),
    }  # fmt: skip
    as_written_before = {
        "init": "soft", "epsilon": 0.1, "is_epsilon_learned": False, "num_iterations": 20, "gradient": "unrolled",
        "solver": "auto",
    }  # fmt: skip
    assert parse(TransportConfig, as_written_before) == TransportConfig(init="soft", epsilon=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_rectangular": True}, r"transport\.init: identity has no meaning"),
        ({"num_groups": 3}, r"channels: 64 must be a multiple of transport\.num_groups=3"),
        ({"num_groups": 0}, r"transport\.num_groups: 0"),
        ({"polar_weight": -1.0}, r"transport\.polar_weight: -1\.0"),
        ({"dustbin_share": 1.0}, r"transport\.dustbin_share: 1\.0"),
    ],
)
def test_unusable_variants_are_refused_by_their_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse(HeadConfig, {"transport": changes})
