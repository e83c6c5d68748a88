import pytest
import torch
from torch import nn
from torch.nn import functional

from cvft.activation import activate, convolve, convolve_and_pool
from cvft.noise import dropout, pair_noise
from cvft.ops import max_pool

NOISE = pair_noise(torch.arange(3), seed=1, step=2)


def _features(dtype=torch.float64, channels=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, channels, 6, 7, dtype=dtype, generator=generator).contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", [None, NOISE])
def test_activation_equals_relu_and_dropout_one_after_the_other_to_the_bit(dtype, noise):
    leaf = _features(dtype).requires_grad_()
    found = activate(leaf * 1, probability=0.3, noise=noise)
    expected = functional.relu(leaf) if noise is None else dropout(functional.relu(leaf), 0.3, noise)
    assert torch.equal(found, expected)
    back = _features(dtype).flip(0)
    (gradient,) = torch.autograd.grad(found, leaf, back)
    (wanted,) = torch.autograd.grad(expected, leaf, back)
    assert torch.equal(gradient, wanted)


def test_activation_keeps_nothing_but_its_output_for_the_backward_pass():
    kept = []
    leaf = _features(torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        activate(leaf * 1, probability=0.3, noise=NOISE)
    assert kept == [leaf.numel()]


def test_nan_goes_through_both_ways():
    leaf = _features().requires_grad_()
    broken = leaf.detach().clone()
    broken[1, 2, 3, 4] = float("nan")
    found = activate((leaf * 1).add(broken - leaf.detach()), noise=NOISE, probability=0.0)
    assert found.isnan().sum() == 1
    assert found[1, 2, 3, 4].isnan()


@pytest.mark.parametrize("pooling", ["ceil", "floor"])
def test_pooling_before_the_relu_equals_pooling_after_it_gradients_included(pooling):
    convolution = nn.Conv2d(5, 4, 3, padding=1, dtype=torch.float64)
    leaf = _features().requires_grad_()
    inputs = (leaf, *convolution.parameters())
    found, expected = convolve_and_pool(convolution, leaf, pooling=pooling), None
    expected = max_pool(convolve(convolution, leaf), pooling)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)
    for mine, wanted in zip(
        *(torch.autograd.grad(each.square().sum(), inputs) for each in (found, expected)), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
