import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cvft.config import LossConfig
from cvft.errors import TrainingError
from cvft.loss import build_loss


def _descriptors(num_pairs: int = 7, size: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ground, aerial = torch.randn(2, num_pairs, size, dtype=torch.float64, generator=generator)
    return functional.normalize(ground, dim=1), functional.normalize(aerial + ground, dim=1)


def _triple_loop(ground: Tensor, aerial: Tensor, gamma: float, is_masked: Tensor | None = None) -> float:
    """The definition, in float64 and plain Python."""
    total, count = 0.0, 0
    for left, right in ((ground.tolist(), aerial.tolist()), (aerial.tolist(), ground.tolist())):
        for i, query in enumerate(left):
            for j, reference in enumerate(right):
                if i == j or (is_masked is not None and is_masked[i, j]):
                    continue
                positive = sum((a - b) ** 2 for a, b in zip(query, right[i], strict=True))
                negative = sum((a - b) ** 2 for a, b in zip(query, reference, strict=True))
                total += math.log1p(math.exp(gamma * (positive - negative)))
                count += 1
    return total / count


@pytest.mark.parametrize("gamma", [1.0, 10.0, 60.0])
def test_loss_equals_the_triple_loop_over_pairs_of_unit_vectors(gamma):
    ground, aerial = _descriptors()
    loss = build_loss(LossConfig(gamma=gamma))
    assert loss(ground, aerial).item() == pytest.approx(_triple_loop(ground, aerial, gamma), rel=1e-12)


def test_loss_has_the_gradient_of_its_definition():
    ground, aerial = (tensor.requires_grad_() for tensor in _descriptors(num_pairs=4, size=3))
    assert torch.autograd.gradcheck(build_loss(LossConfig(gamma=3.0)), (ground, aerial))


def test_official_code_differs_by_the_diagonal_alone():
    ground, aerial = (tensor.requires_grad_() for tensor in _descriptors())
    num_pairs, gamma = len(ground), 10.0
    distance = 2 - 2 * ground @ aerial.T
    positive = distance.diagonal()
    directions = [torch.log(1 + torch.exp(gamma * (p - distance))) for p in (positive[:, None], positive[None, :])]
    official = sum(terms.sum() / (num_pairs * (num_pairs - 1)) for terms in directions) / 2
    ours = build_loss(LossConfig(gamma=gamma))(ground, aerial)
    torch.testing.assert_close(official, ours + math.log(2) / (num_pairs - 1), rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, (ground, aerial)) for value in (official, ours)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-14)


def test_references_nearer_than_the_mask_are_left_out_in_both_directions():
    ground, aerial = _descriptors(num_pairs=4)
    location_m = torch.tensor([[0, 0, 0], [15, 19.9, 0], [15, 20, 0], [5e6, 0, 0]], dtype=torch.float64)
    is_masked = torch.zeros(4, 4, dtype=torch.bool)
    for i, j in ((0, 1), (1, 2)):  # 24.9 m and 0.1 m; 0 and 2 are exactly 25 m apart
        is_masked[i, j] = is_masked[j, i] = True
    loss = build_loss(LossConfig(mask_distance_m=25.0))
    expected = _triple_loop(ground, aerial, 10.0, is_masked)
    assert loss(ground, aerial, location_m=location_m).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("place_m", [(4e6, 3e6, 4e6), (-4472.0e3, 2671.0e3, -3668.0e3)])
def test_the_mask_is_right_to_a_hundredth_of_a_millimetre_at_earth_centred_positions(place_m):
    ground, aerial = _descriptors(num_pairs=4)
    direction = functional.normalize(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), dim=0)
    steps_m = torch.tensor([0.0, 24.99999, 50.0, 1e7], dtype=torch.float64)  # 50 is 25.00001 from its neighbour
    location_m = torch.tensor(place_m, dtype=torch.float64) + steps_m[:, None] * direction
    is_masked = torch.zeros(4, 4, dtype=torch.bool)
    is_masked[0, 1] = is_masked[1, 0] = True
    loss = build_loss(LossConfig(mask_distance_m=25.0))
    expected = _triple_loop(ground, aerial, 10.0, is_masked)
    assert loss(ground, aerial, location_m=location_m).item() == pytest.approx(expected, rel=1e-12)
    # What the test guards against: the expanded form and float32 miss the hundredth.
    inner = location_m @ location_m.T
    squared = inner.diagonal()[:, None] + inner.diagonal() - 2 * inner
    assert (squared[1, 2] - 25.00001**2).abs() > 1e-4
    assert (location_m.float()[0] - location_m.float()[1]).norm().sub(24.99999).abs() > 1e-3


def test_pairs_of_unknown_location_are_never_masked():
    ground, aerial = _descriptors(num_pairs=4)
    location_m = torch.full((4, 3), math.nan, dtype=torch.float64)
    masked = build_loss(LossConfig(mask_distance_m=25.0))(ground, aerial, location_m=location_m)
    assert masked.item() == build_loss(LossConfig())(ground, aerial).item()


@pytest.mark.parametrize(
    ("num_pairs", "mask_distance_m", "words"),
    [(1, None, "a batch of 1 pair has no negatives"), (3, 25.0, "all 3 pairs .* mask_distance_m=25.0")],
)
def test_a_batch_without_negatives_is_refused(num_pairs, mask_distance_m, words):
    ground, aerial = _descriptors(num_pairs=num_pairs)
    loss = build_loss(LossConfig(mask_distance_m=mask_distance_m))
    with pytest.raises(TrainingError, match=words):
        loss(ground, aerial, location_m=torch.zeros(num_pairs, 3, dtype=torch.float64))


def test_loss_is_float32_under_autocast():
    ground, aerial = (tensor.float() for tensor in _descriptors(size=512))
    loss = build_loss(LossConfig())
    expected = loss(ground, aerial)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(ground, aerial)
        rounded = loss(ground.bfloat16(), aerial.bfloat16())
    assert found.dtype == rounded.dtype == torch.float32
    assert found.item() == expected.item()


def test_loss_of_far_apart_descriptors_stays_finite():
    ground = functional.normalize(torch.ones(2, 8), dim=1)
    aerial = torch.stack([-ground[0], ground[0]])  # the worst order: d_positive - d_negative is 4 and -4
    assert build_loss(LossConfig(gamma=1000.0))(ground, aerial).isfinite()
