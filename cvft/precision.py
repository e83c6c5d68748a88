"""Where float32 has to be float32: transport, losses and ranking."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Raise shorter formats to float32, and leave float64 as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast and the short formats inside float32 products (TF32, bfloat16); put them back afterwards.

    The formats are settings of the whole process: other threads feel them too.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # no stub has it
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
