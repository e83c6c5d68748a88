import copy
import dataclasses

import pytest
import torch
from torch import nn

from cvft.config import BackboneConfig, HeadConfig, LossConfig, ModelConfig, PreprocessConfig, TransportConfig
from cvft.gradients import Forward, compute_gradients
from cvft.loss import build_loss
from cvft.model import build_model
from cvft.preprocess import Preprocess
from tests.cvft.tiny import TinyModel, preprocess, random_batch, train_batches

LOSSES = (LossConfig(mask_distance_m=15.0), LossConfig(kind="info_nce", temperature=0.5, mask_distance_m=15.0))
FORWARD = Forward(preprocess=preprocess, seed=5, step=3)


def _forward(dtype=torch.float32, chunk_size=None) -> Forward:
    return dataclasses.replace(FORWARD, preprocess=lambda pixels: preprocess(pixels).to(dtype), chunk_size=chunk_size)


def _largest_difference(model, other):
    """Relative to the largest gradient of each tensor."""
    return max(
        ((mine.grad - theirs.grad).abs().max() / mine.grad.abs().max()).item()
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True)
        if mine.requires_grad
    )


@pytest.mark.parametrize("config", LOSSES, ids=lambda config: config.kind)
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 8, 100])
def test_chunks_have_the_gradients_of_one_pass_dropout_included(config, chunk_size):
    (batch,) = train_batches(1)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = TinyModel(dropout=0.3, dtype=dtype)
        other = copy.deepcopy(model)
        loss, other_loss = build_loss(config), build_loss(config)
        expected = compute_gradients(model, batch, forward=_forward(dtype), loss=loss)
        found = compute_gradients(other, batch, forward=_forward(dtype, chunk_size), loss=other_loss)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
        assert _largest_difference(model, other) < tolerance
        if config.kind == "info_nce":
            assert _largest_difference(loss, other_loss) < tolerance


def test_dropout_is_on_in_that_comparison():
    (batch,) = train_batches(1)
    values = [
        compute_gradients(TinyModel(dropout=share), batch, forward=_forward(), loss=build_loss(LossConfig())).item()
        for share in (0.0, 0.3)
    ]
    assert values[0] != values[1]


class _Noisy(nn.Module):
    """A network of somebody else, whose randomness comes from torch's generator."""

    def __init__(self):
        super().__init__()
        self.inner = TinyModel(dtype=torch.float64)
        self.seen = []

    def forward(self, ground, aerial, *, noise):
        self.seen.append((len(ground), torch.is_grad_enabled()))
        return self.inner(nn.functional.dropout(ground, 0.5), aerial, noise=noise)


def test_the_second_pass_over_a_chunk_repeats_whatever_is_random_in_a_network():
    (batch,) = train_batches(1)
    model = _Noisy()
    value = compute_gradients(model, batch, forward=_forward(torch.float64, 3), loss=build_loss(LossConfig()))
    assert model.seen == [(3, False), (3, False), (2, False), (3, True), (3, True), (2, True)]
    # The directional derivative by differences, at the same random numbers.
    direction = [torch.randn_like(parameter) for parameter in model.parameters()]
    slope = sum((parameter.grad * way).sum() for parameter, way in zip(model.parameters(), direction, strict=True))
    with torch.no_grad():
        for parameter, way in zip(model.parameters(), direction, strict=True):
            parameter.add_(1e-6 * way)
    moved = compute_gradients(model, batch, forward=_forward(torch.float64, 3), loss=build_loss(LossConfig()))
    assert ((moved - value) / 1e-6).item() == pytest.approx(slope.item(), rel=1e-4)


SIZES = PreprocessConfig(ground_size_px=(32, 96), aerial_size_px=(64, 64), std=(64.0, 64.0, 64.0))


def _network(**backbone):
    shape = {"blocks": (1, 1, 1), "width": 0.125, "num_frozen_blocks": 1}
    head = HeadConfig(channels=4, grid=(8, 8), transport=TransportConfig(init="zero"))
    torch.manual_seed(0)
    return build_model(ModelConfig(backbone=BackboneConfig(**shape, **backbone), head=head), SIZES).train()


def _images():
    generator = torch.Generator().manual_seed(0)
    pixels = [
        torch.randint(256, (6, *size, 3), dtype=torch.uint8, generator=generator) for size in ((32, 96), (64, 64))
    ]
    return dataclasses.replace(random_batch(torch.arange(6)), ground=pixels[0], aerial=pixels[1])


@pytest.mark.parametrize("is_shared", [False, True])
def test_the_real_network_in_chunks_with_dropout_equals_one_pass(is_shared):
    model = _network(dropout=0.3, is_shared=is_shared)
    other, batch = copy.deepcopy(model), _images()
    forward = dataclasses.replace(FORWARD, preprocess=Preprocess(SIZES))
    expected = compute_gradients(model, batch, forward=forward, loss=build_loss(LossConfig()))
    chunked = dataclasses.replace(forward, chunk_size=2)
    found = compute_gradients(other, batch, forward=chunked, loss=build_loss(LossConfig()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    # Of the largest of all gradients: some tensors are sums that all but cancel, and float32 keeps little of those.
    gradients, others = (
        torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.requires_grad])
        for network in (model, other)
    )
    assert (gradients - others).abs().max() < 1e-5 * gradients.abs().max()


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_bfloat16_is_near_float32_and_trains_float32_weights(chunk_size):
    models, values, views = {}, {}, {}
    for precision in ("float32", "bfloat16"):
        model, batch = _network(dropout=0.0), _images()
        forward = dataclasses.replace(FORWARD, preprocess=Preprocess(SIZES), precision=precision, chunk_size=chunk_size)
        values[precision] = compute_gradients(model, batch, forward=forward, loss=build_loss(LossConfig()))
        views[precision] = forward(model, batch, slice(0, 6))
        models[precision] = model
    assert values["bfloat16"].dtype == torch.float32
    assert values["bfloat16"] != values["float32"]
    torch.testing.assert_close(values["bfloat16"], values["float32"], rtol=2e-2, atol=0)
    for short, full in zip(views["bfloat16"], views["float32"], strict=True):
        assert short.dtype == torch.float32
        assert (short * full).sum(1).min() > 1 - 1e-3  # cosine
    for (name, short), full in zip(models["bfloat16"].named_parameters(), models["float32"].parameters(), strict=True):
        if full.requires_grad:
            assert short.dtype == short.grad.dtype == torch.float32, name
            assert torch.cosine_similarity(short.grad.flatten(), full.grad.flatten(), dim=0) > 0.98, name


def test_the_transport_computes_in_float32_within_a_bfloat16_step():
    model, seen = _network(dropout=0.0), {}
    solve = model.transport.transport

    def watched(features):
        result = solve(features)
        seen["features"], seen["plan"] = features.dtype, result.plan
        return result

    model.transport.transport = watched
    forward = dataclasses.replace(FORWARD, preprocess=Preprocess(SIZES), precision="bfloat16")
    forward(model, _images(), slice(0, 6))
    assert (seen["features"], seen["plan"].dtype) == (torch.bfloat16, torch.float32)
    assert (seen["plan"].sum(1) - 1).abs().max() < 1e-5
