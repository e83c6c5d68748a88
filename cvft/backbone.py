"""The VGG trunk: blocks of 3x3 convolutions, a max-pool between two blocks, torchvision's tensor names.

Shape letters: B images, H x W input, C channels of the last block, h x w its map.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cvft.activation import activate, convolve, convolve_and_pool
from cvft.config import BackboneConfig
from cvft.noise import derive, drawn_noise
from cvft.ops import max_pool, pooled_size
from cvft.tensor_files import require_same_tensors, shapes

VGG16_CHANNELS = (64, 128, 256, 512, 512)
_NUM_DROPOUT_BLOCKS = 2
_CHANNELS_PER_GROUP = 8


class Trunk(nn.Module):
    """VGG16 up to conv5_3 (or a smaller one of its kind): [B, 3, H, W] normalised pixels to [B, C, h, w] features.

    The convolutions bear torchvision's names (`features.0.weight` is conv1_1, `features.28.weight` conv5_3 at full
    depth). There is no pool after the last block: the stride is 2 ** (blocks - 1), 16 for the paper's. The frozen
    blocks are not trained and run without autograd, which saves nine tenths of the activations in the paper's recipe.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self._is_recomputed = False
        self.features = nn.ModuleDict()
        self.norms = nn.ModuleDict()
        self._blocks = convolution_positions(config.blocks)
        channels = 3
        for positions, full_width in zip(self._blocks, VGG16_CHANNELS, strict=False):
            out_channels = max(1, round(full_width * config.width))
            for name in positions:
                self.features[name] = _convolution(channels, out_channels)
                if config.norm == "group":
                    self.norms[name] = nn.GroupNorm(max(1, out_channels // _CHANNELS_PER_GROUP), out_channels)
                channels = out_channels
        self.out_channels = channels
        for name in itertools.chain.from_iterable(self._blocks[: config.num_frozen_blocks]):
            for parameter in self._parameters_of(name):
                parameter.requires_grad_(False)

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the features [B, C, h, w] of normalised pixels [B, 3, H, W].

        Args:
            image: [B, 3, H, W].
            noise: int32 [B], decides what dropout drops while training; none draws it from torch's generator.
        """
        if noise is None and self.training and self.config.dropout > 0:
            noise = drawn_noise(len(image), image.device)
        num_frozen = self.config.num_frozen_blocks
        with torch.set_grad_enabled(torch.is_grad_enabled() and num_frozen == 0):
            features = self._run(image, range(num_frozen), noise) if num_frozen else image
        return self._run(features, range(num_frozen, len(self._blocks)), noise)

    def map_size(self, size_px: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of the features of an image of `size_px`."""
        return pooled_size(size_px, len(self._blocks) - 1, self.config.pooling)

    def load_weights(self, weights: Mapping[str, Tensor], *, source: str) -> None:
        """Start from torchvision's `features.*` tensors; `classifier.*` tensors, of no use to a trunk, are left out.

        ImageNet weights of torchvision expect RGB with mean (123.675, 116.28, 103.53) and std (58.395, 57.12, 57.375),
        not the paper's BGR without division: set `preprocess` accordingly.

        Raises:
            CheckpointError: A tensor is missing, unknown or of another shape.
        """
        used = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")}
        own = {name: tensor for name, tensor in self.state_dict().items() if name.startswith("features.")}
        require_same_tensors(shapes(own), shapes(used), source=source)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(used[name])

    def recompute_activations(self) -> None:
        """Keep each block's input alone for the backward pass, and compute the block again there: the same gradients.

        Dropout is a function of the noise, so that a block drops the same values the second time.
        """
        self._is_recomputed = True

    def _run(self, features: Tensor, blocks: range, noise: Tensor | None) -> Tensor:
        for block in blocks:
            if self._is_recomputed and torch.is_grad_enabled():
                features = checkpoint(
                    self._run_block, features, block, noise, use_reentrant=False, preserve_rng_state=False
                )
            else:
                features = self._run_block(features, block, noise)
        return features

    def _run_block(self, features: Tensor, block: int, noise: Tensor | None) -> Tensor:
        is_noisy = self.training and self.config.dropout > 0 and block >= len(self._blocks) - _NUM_DROPOUT_BLOCKS
        *inner, last = self._blocks[block]
        for name in inner:
            features = self._convolve(name, features, noise if is_noisy else None)
        is_pooled = block < len(self._blocks) - 1
        if is_pooled and not is_noisy and last not in self.norms:
            features = convolve_and_pool(self._convolution(last), features, pooling=self.config.pooling)
        else:
            features = self._convolve(last, features, noise if is_noisy else None)
            features = max_pool(features, self.config.pooling) if is_pooled else features
        return features

    def _convolve(self, name: str, features: Tensor, noise: Tensor | None) -> Tensor:
        convolution, probability = self._convolution(name), self.config.dropout
        noise = None if noise is None else derive(noise, int(name))
        if name in self.norms:
            return activate(self.norms[name](convolution(features)), probability=probability, noise=noise)
        return convolve(convolution, features, probability=probability, noise=noise)

    def _convolution(self, name: str) -> nn.Conv2d:
        return cast(nn.Conv2d, self.features[name])

    def _parameters_of(self, name: str) -> Iterator[nn.Parameter]:
        yield from self.features[name].parameters()
        if name in self.norms:
            yield from self.norms[name].parameters()


def convolution_positions(blocks: tuple[int, ...]) -> list[list[str]]:
    """Return, block by block, the positions of the convolutions in torchvision's `features`."""
    positions: list[list[str]] = []
    start = 0
    for num_convolutions in blocks:
        positions.append([str(start + 2 * step) for step in range(num_convolutions)])
        start += 2 * num_convolutions + 1  # each convolution counts its ReLU, each block its pool
    return positions


def _convolution(in_channels: int, out_channels: int) -> nn.Conv2d:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]  # typed optional, made here with bias
    return convolution
