"""How long a network takes for one ground image, measured for several networks in turns.

Whatever else the machine does then slows all of them alike; the ratio of two is the median of the ratios within turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from cvft.config import PreprocessConfig
from cvft.model import CrossViewModel
from cvft.preprocess import Preprocess

_WARM_UP = 3
_MIN_TURNS = 7
_MAX_TURNS = 200
_BUDGET_S = 3.0


@torch.inference_mode()
def ground_times_ms(
    models: Sequence[tuple[CrossViewModel, PreprocessConfig]], device: torch.device
) -> list[list[float]]:
    """Return each network's times from the pixels of one ground image to its descriptor, in milliseconds, by turn.

    Args:
        models: Networks on `device`, and what their input is.
        device: Where they are.
    """
    random = torch.Generator().manual_seed(0)

    def image(config: PreprocessConfig) -> Tensor:
        return torch.randint(0, 256, (1, *config.ground_size_px, 3), dtype=torch.uint8, generator=random).to(device)

    prepared = [(model, Preprocess(config), image(config)) for model, config in models]
    times_ms: list[list[float]] = [[] for _ in prepared]
    started = time.perf_counter()
    for turn in range(_WARM_UP + _MAX_TURNS):
        order = list(range(len(prepared)))
        for number in order if turn % 2 == 0 else reversed(order):  # nobody is always first
            model, preprocess, pixels = prepared[number]
            begun = time.perf_counter()
            model.embed_ground(preprocess(pixels))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= _WARM_UP:
                times_ms[number].append(1000 * (time.perf_counter() - begun))
        if turn >= _WARM_UP + _MIN_TURNS - 1 and time.perf_counter() - started > _BUDGET_S:
            break
    return times_ms


def median_ratio(times_ms: Sequence[float], others_ms: Sequence[float]) -> float:
    """Return how many times longer one network takes than another, from the times of the same turns."""
    return statistics.median(own / other for own, other in zip(times_ms, others_ms, strict=True))


def device_text(device: torch.device) -> str:
    """Name what the times were measured on."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    num_threads = torch.get_num_threads()
    return f"CPU, {num_threads} thread{'' if num_threads == 1 else 's'}"
