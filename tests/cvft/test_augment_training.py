"""Augmented training: chunks, ranks and a resumed training see the same pixels."""

import copy
import dataclasses

import torch

from cvft.augment import Augment, AugmentConfig
from cvft.batch import Batch
from cvft.config import BackboneConfig, HeadConfig, LossConfig, ModelConfig, PreprocessConfig, TransportConfig
from cvft.distributed import current_world, unwrap, wrap_ddp
from cvft.engine import train_epoch
from cvft.gradients import Forward, compute_gradients
from cvft.loss import build_loss
from cvft.model import build_model
from cvft.noise import pair_noise
from cvft.preprocess import Preprocess
from tests.distributed_helper import run_distributed

SIZES = PreprocessConfig(ground_size_px=(32, 96), aerial_size_px=(64, 64), std=(64.0, 64.0, 64.0))
NETWORK = ModelConfig(
    backbone=BackboneConfig(blocks=(1, 1, 1), width=0.125, dropout=0.2, num_frozen_blocks=1),
    head=HeadConfig(channels=4, grid=(8, 8), transport=TransportConfig(init="zero")),
)
CONFIG = AugmentConfig(
    flip=0.5, rotate=0.75, brightness=0.2, contrast=0.2, saturation=0.2, hue_deg=10.0, blur=0.5, erase=0.3,
    fov_deg=(180.0, 360.0), is_orientation_unknown=True,
)  # fmt: skip
FORWARD = Forward(preprocess=Preprocess(SIZES), seed=5, step=3, augment=Augment(CONFIG, SIZES))
NUM_PAIRS = 8


def _network():
    torch.manual_seed(0)
    return build_model(NETWORK, SIZES).train()


def _batch(rows):
    generator = torch.Generator().manual_seed(0)
    sizes = SIZES.ground_size_px, SIZES.aerial_size_px
    views = [torch.randint(256, (NUM_PAIRS, *size, 3), dtype=torch.uint8, generator=generator) for size in sizes]
    ground, aerial = (view[rows] for view in views)
    location_m = torch.zeros(len(rows), 3, dtype=torch.float64)
    return Batch(ground=ground, aerial=aerial, index=rows, location_m=location_m, num_valid=len(rows))


class _Seen:
    """A preprocessor that keeps the pixels that it is given."""

    def __init__(self):
        self.pixels = []

    def __call__(self, pixels):
        self.pixels.append(pixels)
        return Preprocess(SIZES)(pixels)


def test_both_passes_over_a_chunk_see_the_pixels_of_one_pass():
    seen, batch = _Seen(), _batch(torch.arange(NUM_PAIRS))
    forward = dataclasses.replace(FORWARD, preprocess=seen, chunk_size=3)
    compute_gradients(_network(), batch, forward=forward, loss=build_loss(LossConfig()))
    noise = pair_noise(batch.index, seed=5, step=3)
    expected = Augment(CONFIG, SIZES)(batch.ground, batch.aerial, noise)
    assert len(seen.pixels) == 12  # two views of three chunks, twice
    for first in (0, 6):
        for view, pixels in enumerate(expected):
            assert torch.equal(torch.cat(seen.pixels[first + view : first + 6 : 2]), pixels)
    assert not any(torch.equal(new, old) for new, old in zip(expected, (batch.ground, batch.aerial), strict=True))


def test_chunks_have_the_gradients_of_one_pass():
    model, batch = _network(), _batch(torch.arange(NUM_PAIRS))
    other = copy.deepcopy(model)
    expected = compute_gradients(model, batch, forward=FORWARD, loss=build_loss(LossConfig()))
    chunked = dataclasses.replace(FORWARD, chunk_size=3)
    found = compute_gradients(other, batch, forward=chunked, loss=build_loss(LossConfig()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    _assert_close(other, model)
    plain = dataclasses.replace(FORWARD, augment=None)
    assert compute_gradients(_network(), batch, forward=plain, loss=build_loss(LossConfig())) != expected


def _assert_close(model, other):
    gradients, others = (
        torch.cat([part.grad.flatten() for part in network.parameters() if part.requires_grad])
        for network in (model, other)
    )
    assert others.abs().max() > 0
    assert (gradients - others).abs().max() < 1e-5 * others.abs().max()


def test_augmentation_that_is_off_changes_no_bit_of_a_step():
    batch, gradients = _batch(torch.arange(NUM_PAIRS)), []
    for augment in (None, Augment(AugmentConfig(), SIZES)):
        model = _network()
        forward = dataclasses.replace(FORWARD, augment=augment)
        value = compute_gradients(model, batch, forward=forward, loss=build_loss(LossConfig()))
        gradients.append([value, *(part.grad for part in model.parameters() if part.requires_grad)])
    assert all(torch.equal(new, old) for new, old in zip(*gradients, strict=True))


def _check_ranks_equal_one_process() -> None:
    world = current_world()
    alone = _network()
    together = wrap_ddp(copy.deepcopy(alone))
    rows = torch.arange(NUM_PAIRS)
    mine = rows[world.rank :: world.size]
    # One process's pixels are every rank's, to the bit; its gradients follow.
    noise = [pair_noise(part, seed=5, step=3) for part in (rows, mine)]
    whole, own = (
        Augment(CONFIG, SIZES)(batch.ground, batch.aerial, of_pairs)
        for batch, of_pairs in zip((_batch(rows), _batch(mine)), noise, strict=True)
    )
    assert all(torch.equal(part, view[mine]) for part, view in zip(own, whole, strict=True))
    found = compute_gradients(together, _batch(mine), forward=FORWARD, loss=build_loss(LossConfig()))
    # `alone` is not wrapped, and its loss would be gathered too: it is fed the whole batch's descriptors by hand.
    descriptors = alone(*(Preprocess(SIZES)(view) for view in whole), noise=noise[0])
    expected = build_loss(LossConfig())(*descriptors, location_m=_batch(rows).location_m)
    expected.backward()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=0)
    _assert_close(unwrap(together), alone)


def test_two_ranks_train_on_the_pixels_of_one_process():
    run_distributed(_check_ranks_equal_one_process, 2)


def _trained(model, steps, first_step):
    batches = [_batch((torch.arange(NUM_PAIRS) + 3 * step) % NUM_PAIRS) for step in steps]
    optimizer = torch.optim.SGD([part for part in model.parameters() if part.requires_grad], lr=0.1)
    losses = []
    train_epoch(
        model,
        batches,
        preprocess=Preprocess(SIZES),
        loss=build_loss(LossConfig()),
        optimizer=optimizer,
        learning_rate=lambda step: 0.1,
        first_step=first_step,
        seed=2,
        augment=Augment(CONFIG, SIZES),
        on_step=lambda report: losses.append(report.loss),
    )
    return losses


def test_a_resumed_training_goes_on_with_the_pixels_of_an_undisturbed_one():
    straight, resumed = _network(), _network()
    expected = _trained(straight, range(4), 0)
    found = _trained(resumed, range(2), 0)
    torch.manual_seed(99)  # what a new process has
    found += _trained(resumed, range(2, 4), 2)
    assert found == expected
    assert all(torch.equal(new, old) for new, old in zip(resumed.parameters(), straight.parameters(), strict=True))
    assert len(set(expected)) == 4
