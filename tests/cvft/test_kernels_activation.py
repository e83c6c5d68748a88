"""The fused passes after a convolution against the plain ones in float64: on CUDA where there is one, else interpreted.

Triton decides when it is loaded whether it interprets: `test_kernels.py` runs this file in a process of its own with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os

import pytest
import torch
from torch import nn
from torch.nn import functional

from cvft import activation
from cvft.activation import convolve, convolve_and_pool
from cvft.noise import dropout, pair_noise
from cvft.ops import max_pool

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)
if not (IS_INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs CUDA; test_kernels.py runs it in Triton's interpreter", allow_module_level=True)

NUM = 6  # samples: more than one group of the kernel's, and not a multiple of it
TYPES = ((torch.float32, 1e-6), (torch.bfloat16, 1e-2))


@pytest.fixture(autouse=True)
def _no_tf32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def _convolution() -> nn.Conv2d:
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 24, 3, padding=1).to(DEVICE, memory_format=torch.channels_last)
    nn.init.normal_(convolution.bias)
    return convolution


def _features(height: int = 9, width: int = 7) -> torch.Tensor:
    features = torch.randn(NUM, 8, height, width, generator=torch.Generator().manual_seed(1))
    # Values that bfloat16 holds, so that both see the same.
    return features.bfloat16().float().to(DEVICE).contiguous(memory_format=torch.channels_last)


def _noise() -> torch.Tensor:
    return pair_noise(torch.arange(NUM), seed=1, step=2).to(DEVICE)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("is_dropped", [False, True])
def test_bias_relu_and_dropout_and_their_gradients_equal_the_plain_ones_in_float64(dtype, tolerance, is_dropped):
    convolution, noise = _convolution(), _noise() if is_dropped else None
    with torch.no_grad():
        convolution.weight.copy_(convolution.weight.bfloat16())
    exact = copy.deepcopy(convolution).double()
    leaf = _features().requires_grad_()
    exact_leaf = leaf.detach().double().requires_grad_()
    assert activation._is_fused(leaf, convolution)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = convolve(convolution, leaf, probability=0.3, noise=noise)
    assert found.dtype == dtype
    expected = functional.relu(exact(exact_leaf))
    expected = expected if noise is None else dropout(expected, 0.3, noise)
    assert _difference(found, expected) < tolerance
    # What is dropped is dropped in both; what lies at the edge of the ReLU may not be.
    assert ((found == 0) != (expected == 0)).float().mean() < (0.01 if dtype == torch.bfloat16 else 1e-3)
    back = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    back = torch.where(expected.abs() > 0.02, back, 0.0)
    found.backward(back.to(dtype))
    expected.backward(back.double())
    for mine, wanted in zip((leaf, *convolution.parameters()), (exact_leaf, *exact.parameters()), strict=True):
        assert _difference(mine.grad, wanted.grad) < 3 * tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("pooling", ["ceil", "floor"])
@pytest.mark.parametrize("size", [(9, 7), (8, 6)])
def test_a_pool_without_gradient_equals_the_plain_one_in_float64(dtype, tolerance, pooling, size):
    convolution, features = _convolution(), _features(*size)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert activation._is_fused(features, convolution)
        found = convolve_and_pool(convolution, features, pooling=pooling)
    expected = max_pool(functional.relu(copy.deepcopy(convolution).double()(features.double())), pooling)
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert _difference(found, expected) < tolerance


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in which Triton interprets
def test_nan_goes_through():
    convolution, features = _convolution(), _features()
    features[2, :, 4, 4] = math.nan
    found = convolve(convolution, features, probability=0.0, noise=_noise())
    assert found[2, :, 3:6, 3:6].isnan().all()
    assert int(found.isnan().sum()) == 9 * 24
    with torch.no_grad():
        pooled = convolve_and_pool(convolution, features, pooling="ceil")
    assert pooled[2, :, 1:3, 1:3].isnan().all()
    assert int(pooled.isnan().sum()) == 4 * 24


def test_maps_of_another_layout_or_in_float64_take_the_plain_way():
    convolution, features = _convolution(), _features()
    assert not activation._is_fused(features.contiguous(), convolution)
    assert not activation._is_fused(features.double(), convolution)
