import copy

import pytest
import torch
from torch import nn

from cvft.averaging import WeightAverage


def trained(num_steps, average_of, *, first_step=0, network=None):
    """Take plain gradient steps towards another target at each, so that the weights never settle."""
    network = network or network_of(0)
    average = average_of(network)
    optimizer = torch.optim.SGD([value for value in network.parameters() if value.requires_grad], lr=0.1)
    seen = []
    for step in range(first_step, num_steps):
        target = torch.randn(3, 2, generator=torch.Generator().manual_seed(step))
        loss = (network(torch.ones(3, 4)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(step)
        seen.append(network[0].weight.detach().clone())
    return network, average, seen


def network_of(seed):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    network[1].bias.requires_grad_(False)
    return network


def test_it_is_the_sum_of_all_weights_so_far_each_with_its_share():
    start = network_of(0)[0].weight.detach().double()
    _, average, seen = trained(200, lambda network: WeightAverage(network, decay=0.9))
    expected = start
    for step, weights in enumerate(seen):
        kept = min(0.9, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weights.double()
    torch.testing.assert_close(average.weights()["0.weight"].double(), expected, rtol=0, atol=1e-6)
    assert (average.weights()["0.weight"] - seen[-1]).abs().max() > 1e-3


def test_the_network_computes_with_the_averages_within_and_has_its_weights_again_after_an_error():
    network, average, _ = trained(20, lambda network: WeightAverage(network, decay=0.9))
    before = copy.deepcopy(network.state_dict())
    reference = network_of(1)
    reference.load_state_dict(average.weights())

    @average.applied()
    def fail():
        assert torch.equal(network(torch.ones(1, 4)), reference(torch.ones(1, 4)))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert average.weights().keys() == before.keys()


def test_one_that_goes_on_from_its_tensors_equals_one_that_never_stopped():
    def fresh(network):
        return WeightAverage(network, decay=0.9)

    straight_network, straight, _ = trained(30, fresh)
    network, average, _ = trained(12, fresh)
    weights, raw = copy.deepcopy(average.weights()), copy.deepcopy(average.raw())

    def resumed(other):
        again = fresh(other)
        other.load_state_dict(weights)
        again.restore(raw)
        return again

    network, average, _ = trained(30, resumed, first_step=12, network=network_of(7))
    for one, other in (
        (network.state_dict(), straight_network.state_dict()),
        (average.weights(), straight.weights()),
    ):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
