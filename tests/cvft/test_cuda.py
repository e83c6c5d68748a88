"""What a GPU computes equals what the CPU computes; the fused kernels are taken by themselves there."""

import copy
import dataclasses
import importlib.util

import pytest
import torch

from cvft import activation
from cvft.batch import Batch, prefetch
from cvft.config import BackboneConfig, HeadConfig, LossConfig, ModelConfig, PreprocessConfig, TransportConfig
from cvft.engine import embed, train_epoch
from cvft.gradients import Forward, compute_gradients
from cvft.loss import build_loss
from cvft.model import build_model
from cvft.preprocess import Preprocess
from cvft.retrieval import rank_matches
from tests.cvft.tiny import random_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = PreprocessConfig(ground_size_px=(32, 96), aerial_size_px=(64, 64), std=(64.0, 64.0, 64.0))
CONFIG = ModelConfig(
    backbone=BackboneConfig(blocks=(1, 1, 1), width=0.125, dropout=0.25, num_frozen_blocks=1),
    head=HeadConfig(channels=4, grid=(8, 8), transport=TransportConfig(init="zero")),
)
LOSSES = (LossConfig(mask_distance_m=15.0), LossConfig(kind="info_nce", mask_distance_m=15.0))
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_tf32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def _network():
    torch.manual_seed(0)
    return build_model(CONFIG, SIZES).to(memory_format=torch.channels_last)


def _images(size: int = 8, first: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first)
    ground, aerial = (
        torch.randint(256, (size, *shape, 3), dtype=torch.uint8, generator=generator)
        for shape in (SIZES.ground_size_px, SIZES.aerial_size_px)
    )
    return dataclasses.replace(random_batch(torch.arange(first, first + size)), ground=ground, aerial=aerial)


def _step(model, batch, config, dtype, **options):
    loss, normalise = build_loss(config).to(batch.ground.device), Preprocess(SIZES)
    forward = Forward(preprocess=lambda pixels: normalise(pixels).to(dtype), seed=1, step=2, **options)
    value = compute_gradients(model, batch, forward=forward, loss=loss)
    gradients = [each.grad for module in (model, loss) for each in module.parameters() if each.requires_grad]
    return value.cpu(), torch.cat([gradient.cpu().double().flatten() for gradient in gradients])


@pytest.mark.parametrize("config", LOSSES, ids=lambda config: config.kind)
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_step_on_cuda_equals_the_cpus_dropout_included(config, chunk_size, dtype, tolerance):
    model = _network()
    value, gradients = _step(copy.deepcopy(model).double(), _images(), config, torch.float64)
    found, others = _step(model.to(CUDA, dtype), _images().to(CUDA), config, dtype, chunk_size=chunk_size)
    torch.testing.assert_close(found.double(), value, rtol=tolerance, atol=0)
    assert (gradients - others).abs().max() <= tolerance * gradients.abs().max()


@pytest.mark.parametrize("config", LOSSES, ids=lambda config: config.kind)
def test_a_bfloat16_step_on_cuda_is_near_float64(config):
    model = _network()
    value, gradients = _step(copy.deepcopy(model).double(), _images(), config, torch.float64)
    found, others = _step(model.to(CUDA), _images().to(CUDA), config, torch.float32, precision="bfloat16")
    torch.testing.assert_close(found.double(), value, rtol=3e-2, atol=0)
    assert torch.cosine_similarity(gradients, others, dim=0) > 0.97


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_the_fused_passes_are_taken_by_themselves(monkeypatch):
    taken = []
    for name in ("_activate_fused", "_gradient_fused", "_pool"):
        run = getattr(activation, name)
        monkeypatch.setattr(activation, name, lambda *given, run=run, name=name: taken.append(name) or run(*given))
    _step(_network().to(CUDA), _images().to(CUDA), LOSSES[0], torch.float32, precision="bfloat16")
    assert set(taken) == {"_activate_fused", "_gradient_fused", "_pool"}


def test_training_from_reused_pinned_memory_equals_training_from_batches_on_the_device():
    def train(batches):
        model = _network().to(CUDA)
        losses = []
        train_epoch(
            model,
            batches,
            preprocess=Preprocess(SIZES),
            loss=build_loss(LOSSES[0]),
            optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
            learning_rate=lambda step: 1e-3,
            first_step=0,
            seed=0,
            on_step=lambda report: losses.append(report.loss),
        )
        return losses

    def reused():
        pinned = [{name: getattr(_images(), name).pin_memory() for name in ("ground", "aerial")} for _ in range(3)]
        events = [torch.cuda.Event() for _ in pinned]
        for step in range(9):
            buffer, event = pinned[step % 3], events[step % 3]
            event.synchronize()
            batch = _images(first=8 * step)
            for name, tensor in buffer.items():
                tensor.copy_(getattr(batch, name))
            yield dataclasses.replace(batch, **buffer)
            event.record()

    expected = train([_images(first=8 * step).to(CUDA) for step in range(9)])
    assert train(prefetch(reused(), CUDA)) == pytest.approx(expected, rel=1e-5)


def test_descriptors_and_ranks_on_cuda_equal_the_cpus():
    batches = [_images(first=8 * place) for place in range(4)]
    network = _network()
    expected = embed(network, batches, preprocess=Preprocess(SIZES))
    found = embed(network.to(CUDA), prefetch(batches, CUDA), preprocess=Preprocess(SIZES))
    torch.testing.assert_close(found.ground, expected.ground, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.aerial, expected.aerial, rtol=0, atol=1e-5)
    torch.manual_seed(0)
    query, reference = torch.nn.functional.normalize(torch.randn(2, 900, 256), dim=2)
    reference[100:200] = reference[:100]
    on_cpu = rank_matches(query, reference, block=128).match_rank
    assert torch.equal(rank_matches(query.to(CUDA), reference.to(CUDA), block=128).match_rank, on_cpu)
