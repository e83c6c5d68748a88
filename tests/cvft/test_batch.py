"""Batches reach the device whole and in order, whatever their memory is used for afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cvft.batch import Batch, prefetch

NUM_BATCHES = 12


def ring(num_batches: int, *, is_pinned: bool) -> Iterator[Batch]:
    """Batches of equal numbers in two buffers, each filled again once its copy is done, as the loader does it."""
    buffers = [torch.empty(4, 64, 64, 3, dtype=torch.uint8, pin_memory=is_pinned) for _ in range(2)]
    copied = [None, None]
    for number in range(num_batches):
        if copied[number % 2] is not None:
            copied[number % 2].synchronize()
        pixels = buffers[number % 2].fill_(number)
        place = torch.full((4, 3), float(number), dtype=torch.float64)
        yield Batch(ground=pixels, aerial=pixels, index=torch.arange(4), location_m=place, num_valid=4)
        if is_pinned:
            copied[number % 2] = torch.cuda.Event()
            copied[number % 2].record()


def test_on_a_cpu_batches_are_passed_on_as_they_are():
    batches = list(ring(2, is_pinned=False))
    assert list(prefetch(batches, torch.device("cpu"))) == batches


def test_no_batch_is_asked_for_before_it_is_needed_on_a_cpu():
    asked = iter(ring(3, is_pinned=False))
    for number, batch in enumerate(prefetch(asked, torch.device("cpu"))):
        assert batch.ground.unique().item() == number


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_batches_keep_their_content_while_the_next_ones_are_copied():
    device = torch.device("cuda")
    ballast = torch.randn(2048, 2048, device=device)
    sums = []
    for batch in prefetch(ring(NUM_BATCHES, is_pinned=True), device):
        assert batch.ground.is_cuda
        for _ in range(10):
            ballast = ballast @ ballast / 2048  # keeps the stream busy, so that copies run ahead of it
        sums.append((batch.ground.float().mean() + batch.aerial.float().mean() + batch.location_m.mean()) / 3)
    assert torch.stack(sums).tolist() == pytest.approx(range(NUM_BATCHES))
