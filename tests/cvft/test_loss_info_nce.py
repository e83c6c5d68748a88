import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cvft.config import LossConfig, OptimizerConfig
from cvft.errors import ConfigError, TrainingError
from cvft.loss import InfoNCELoss, build_loss
from cvft.optim import build_optimizer


def _descriptors(num_pairs: int = 7, size: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ground, aerial = torch.randn(2, num_pairs, size, dtype=torch.float64, generator=generator)
    return functional.normalize(ground, dim=1), functional.normalize(aerial + ground, dim=1)


def _loss(**options) -> InfoNCELoss:
    return build_loss(LossConfig(kind="info_nce", **options)).double()


def _definition(ground: Tensor, aerial: Tensor, *, scale: float, smoothing: float, is_masked: Tensor) -> float:
    """The definition, in float64 and plain Python: a smoothed label over the references that are left."""
    total = 0.0
    for left, right in ((ground.tolist(), aerial.tolist()), (aerial.tolist(), ground.tolist())):
        for i, query in enumerate(left):
            kept = [j for j in range(len(right)) if j == i or not is_masked[i, j]]
            logits = {j: scale * sum(a * b for a, b in zip(query, right[j], strict=True)) for j in kept}
            log_sum = math.log(sum(math.exp(value) for value in logits.values()))
            label = {j: smoothing / len(kept) + (1 - smoothing) * (j == i) for j in kept}
            total -= sum(label[j] * (logits[j] - log_sum) for j in kept)
    return total / (2 * len(ground))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_loss_equals_torchs_smoothed_cross_entropy_in_both_directions(temperature, smoothing):
    ground, aerial = _descriptors()
    loss = _loss(temperature=temperature, label_smoothing=smoothing)
    logits, labels = loss.log_scale.exp() * ground @ aerial.T, torch.arange(len(ground))
    assert loss.log_scale.exp().item() == pytest.approx(1 / temperature, rel=1e-6)
    expected = sum(functional.cross_entropy(each, labels, label_smoothing=smoothing) for each in (logits, logits.T)) / 2
    assert loss(ground, aerial).item() == pytest.approx(expected.item(), rel=1e-12)


def test_references_nearer_than_the_mask_are_left_out_of_the_softmax():
    ground, aerial = _descriptors(num_pairs=4)
    location_m = torch.tensor([[0, 0, 0], [15, 19.9, 0], [15, 20, 0], [5e6, 0, 0]], dtype=torch.float64)
    is_masked = torch.zeros(4, 4, dtype=torch.bool)
    for i, j in ((0, 1), (1, 2)):  # 24.9 m and 0.1 m; 0 and 2 are exactly 25 m apart
        is_masked[i, j] = is_masked[j, i] = True
    loss = _loss(mask_distance_m=25.0, label_smoothing=0.1)
    scale = loss.log_scale.exp().item()
    expected = _definition(ground, aerial, scale=scale, smoothing=0.1, is_masked=is_masked)
    assert loss(ground, aerial, location_m=location_m).item() == pytest.approx(expected, rel=1e-12)
    unmasked = _definition(ground, aerial, scale=scale, smoothing=0.1, is_masked=torch.zeros(4, 4))
    assert loss(ground, aerial, location_m=location_m * math.nan).item() == pytest.approx(unmasked, rel=1e-12)
    assert abs(unmasked - expected) > 1e-3


def test_a_masked_reference_gets_no_gradient_and_one_with_no_negative_left_no_loss():
    ground, aerial = (tensor.requires_grad_() for tensor in _descriptors(num_pairs=3))
    location_m = torch.tensor([[0, 0, 0], [10, 0, 0], [30, 0, 0]], dtype=torch.float64)
    loss = _loss(mask_distance_m=25.0)  # the middle one is near to both others
    loss(ground, aerial, location_m=location_m).backward()
    assert (ground.grad[1], aerial.grad[1]) == (pytest.approx(0, abs=1e-15), pytest.approx(0, abs=1e-15))
    assert ground.grad[0].abs().max() > 1e-3
    assert all(tensor.grad.isfinite().all() for tensor in (ground, aerial, loss.log_scale))


def test_loss_has_the_gradient_of_its_definition_in_the_temperature_too():
    ground, aerial = (tensor.requires_grad_() for tensor in _descriptors(num_pairs=4, size=3))
    location_m = torch.arange(12, dtype=torch.float64).reshape(4, 3)
    loss = _loss(temperature=0.5, mask_distance_m=6.0)

    def of(ground: Tensor, aerial: Tensor, log_scale: Tensor) -> Tensor:
        return torch.func.functional_call(loss, {"log_scale": log_scale}, (ground, aerial), {"location_m": location_m})

    assert torch.autograd.gradcheck(of, (ground, aerial, loss.log_scale))


@pytest.mark.parametrize(
    ("num_pairs", "mask_distance_m", "words"),
    [(1, None, "a batch of 1 pair has no negatives"), (3, 25.0, "all 3 pairs .* mask_distance_m=25.0")],
)
def test_a_batch_without_negatives_is_refused(num_pairs, mask_distance_m, words):
    ground, aerial = _descriptors(num_pairs=num_pairs)
    with pytest.raises(TrainingError, match=words):
        _loss(mask_distance_m=mask_distance_m)(ground, aerial, location_m=torch.zeros(num_pairs, 3))


def test_loss_is_float32_under_autocast():
    ground, aerial = (tensor.float() for tensor in _descriptors(size=512))
    loss = build_loss(LossConfig(kind="info_nce"))
    expected = loss(ground, aerial)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(ground, aerial)
        rounded = loss(ground.bfloat16(), aerial.bfloat16())
    assert found.dtype == rounded.dtype == torch.float32
    assert found.item() == expected.item()


def test_the_scale_learns_without_decay_and_stays_within_one_and_a_hundred():
    for sign, bound in ((1.0, 100.0), (-1.0, 1.0)):
        model, loss = torch.nn.Linear(2, 2), build_loss(LossConfig(kind="info_nce"))
        config = OptimizerConfig(kind="adamw", learning_rate=1.0, weight_decay=0.5)
        optimizer = build_optimizer(model, config, loss=loss)
        decaying, sparing = optimizer.param_groups
        assert sparing["params"][-1] is loss.log_scale
        assert all(parameter is not loss.log_scale for parameter in decaying["params"])
        seen = [loss.log_scale.exp().item()]
        for _ in range(4):
            loss.log_scale.grad = torch.tensor(-sign)
            optimizer.step()
            loss.clamp_parameters()
            seen.append(loss.log_scale.exp().item())
        assert seen[1] == pytest.approx(math.exp(sign) / 0.07, rel=1e-5)  # Adam's first step has the size of the rate
        assert seen[-2:] == pytest.approx([bound, bound], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.001}, r"temperature: 0.001 must lie in \[0.01, 1\]"),
        ({"label_smoothing": 1.0}, r"label_smoothing: 1.0 must lie in \[0, 1\)"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        LossConfig(**options)
