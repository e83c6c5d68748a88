"""From the pixels of a batch to the network's input, on the device where the network is.

Shape letters: B images, H x W pixels, 3 channels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cvft.config import PreprocessConfig


class Preprocess:
    """Order the channels, subtract the mean and divide by the deviation, as the weights expect it."""

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise a batch.

        Args:
            pixels: uint8 [B, H, W, 3] in RGB order, at the network's input size.

        Returns:
            float32 [B, 3, H, W] in `config.channel_order`, on the device of `pixels`; in memory the channels stay last,
            the form in which convolutions run fastest.
        """
        ordered = pixels.flip(-1) if self.config.channel_order == "bgr" else pixels
        mean = _constant(self.config.mean, pixels.device)
        std = _constant(self.config.std, pixels.device)
        return ((ordered.float() - mean) / std).permute(0, 3, 1, 2)


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Keep three numbers on the device: copying them there at each step would wait for the device."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)
