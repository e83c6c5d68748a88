"""The network: two trunks, a head chosen by configuration, one descriptor per image.

Shape letters: B images, H x W pixels, C channels, h x w the grid, D values of a descriptor.
"""

from __future__ import annotations

import os
import shutil

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvft.backbone import Trunk
from cvft.config import BackboneConfig, HeadConfig, ModelConfig, PreprocessConfig
from cvft.errors import ConfigError
from cvft.feature_transport import FeatureTransport
from cvft.noise import derive
from cvft.ops import LegacyBilinearResize, SameConv2d, pooled_size
from cvft.polar_transform import PolarTransform
from cvft.precision import at_least_float32
from cvft.tensor_files import read_weights
from cvft.timm_backbone import TimmTrunk
from cvft.transport import TransportResult

_GROUND, _AERIAL = 1, 2  # the places of the two views' noise


class CrossViewModel(nn.Module):
    """Embeds ground and aerial images in one space, each side without the other.

    Heads (`config.head.kind`): `cvft` projects both feature maps to the same grid and moves the ground features by
    transport; `conv` is the same without transport; `global_pool` takes the maximum of each channel of the trunk. The
    latter two are the paper's ablation.

    Attributes:
        config: What the network was built from.
        descriptor_dim: D.
    """

    def __init__(self, config: ModelConfig, preprocess: PreprocessConfig) -> None:
        super().__init__()
        self.config = config
        self.polar = PolarTransform(preprocess.ground_size_px) if preprocess.polar else None
        self.ground_trunk = _trunk(config.backbone)
        self.aerial_trunk = None if config.backbone.is_shared else _trunk(config.backbone)
        channels, head = self.ground_trunk.out_channels, config.head
        self.descriptor_dim = channels
        if head.kind != "global_pool":
            ground_map, aerial_map = (
                pooled_size(self.ground_trunk.map_size(size_px), head.stride - 1, "ceil")
                for size_px in (preprocess.ground_size_px, preprocess.aerial_input_px)
            )
            _require_grid(config, aerial_map, preprocess.aerial_input_px)
            self.ground_projection = _projection(channels, head)
            self.aerial_projection = _projection(channels, head)
            is_resized = head.kind == "conv" or not head.transport.is_rectangular
            self.resize = LegacyBilinearResize(ground_map, head.grid) if is_resized else nn.Identity()
            self.descriptor_dim = head.channels * head.grid[0] * head.grid[1]
        if head.kind == "cvft":
            if preprocess.polar and head.transport.polar_weight is not None:
                raise ConfigError(
                    "model.head.transport.polar_weight: the prior leads to an aerial image with north up, which "
                    "preprocess.polar unrolls; set one of them to null or false"
                )
            self.transport = FeatureTransport(
                head.transport, channels=head.channels, grid=head.grid, ground_map=ground_map
            )

    def forward(self, ground: Tensor, aerial: Tensor, *, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the unit descriptors [B, D] of both sides of B pairs, from normalised pixels [B, 3, H, W].

        Args:
            ground: [B, 3, H, W].
            aerial: [B, 3, H, W].
            noise: int32 [B], see `cvft.noise`; decides what dropout drops while training, in each view for itself.
        """
        of_ground, of_aerial = (None, None) if noise is None else (derive(noise, _GROUND), derive(noise, _AERIAL))
        return self.embed_ground(ground, of_ground), self.embed_aerial(aerial, of_aerial)

    def embed_ground(self, ground: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the unit descriptors [B, D] of normalised panoramas [B, 3, H, W]; `noise` as in `Trunk`."""
        if self.config.head.kind == "global_pool":
            return _unit(self.ground_trunk(ground, noise).amax((2, 3)))
        features = self._ground_features(ground, noise)
        return _descriptor(self.transport(features) if self.config.head.kind == "cvft" else features)

    def embed_aerial(self, aerial: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the unit descriptors [B, D] of normalised aerial images [B, 3, H, W]; `noise` as in `Trunk`."""
        if self.polar is not None:
            aerial = self.polar(aerial)
        features = (self.ground_trunk if self.aerial_trunk is None else self.aerial_trunk)(aerial, noise)
        if self.config.head.kind == "global_pool":
            return _unit(features.amax((2, 3)))
        return _descriptor(functional.relu(self.aerial_projection(features)))

    @property
    def trunks(self) -> tuple[Trunk | TimmTrunk, ...]:
        """The trunks of both views, which may be one."""
        return (self.ground_trunk,) if self.aerial_trunk is None else (self.ground_trunk, self.aerial_trunk)

    def compile_trunks(self) -> None:
        """Compile the trunks by torch.compile when they first run; names of tensors and results stay.

        Raises:
            ConfigError: There is no C++ compiler, which torch.compile needs.
        """
        compilers = (os.environ.get("CXX"), "g++", "clang++")
        if not any(shutil.which(compiler) for compiler in compilers if compiler):
            raise ConfigError(
                "train.compile: torch.compile needs a C++ compiler, and neither g++ nor clang++ is on the PATH; "
                "install one, or set train.compile=false"
            )
        for trunk in self.trunks:
            trunk.compile()

    def recompute_activations(self) -> None:
        """Keep less of the trunks for the backward pass and compute it again there; the gradients stay the same."""
        for trunk in self.trunks:
            trunk.recompute_activations()

    def ground_transport(self, ground: Tensor) -> TransportResult:
        """Return the transport of normalised panoramas [B, 3, H, W] as `FeatureTransport.transport` does.

        Raises:
            ConfigError: The head has no transport.
        """
        return self._require_transport().transport(self._ground_features(ground))

    def ground_plan(self, ground: Tensor) -> Tensor:
        """Return the plans [B, n, m] of normalised panoramas [B, 3, H, W], to be looked at.

        Positions are those of `transport.source_grid` and `transport.grid`.

        Raises:
            ConfigError: The head has no transport.
        """
        return self._require_transport().plan(self._ground_features(ground))

    def _require_transport(self) -> FeatureTransport:
        if self.config.head.kind != "cvft":
            raise ConfigError(
                f"model.head.kind: {self.config.head.kind} moves no features; only cvft has a transport plan"
            )
        return self.transport

    def _ground_features(self, ground: Tensor, noise: Tensor | None = None) -> Tensor:
        features: Tensor = self.resize(functional.relu(self.ground_projection(self.ground_trunk(ground, noise))))
        return features


def build_model(config: ModelConfig, preprocess: PreprocessConfig) -> CrossViewModel:
    """Build a network for training: random weights, or trunks that start from `config.backbone.weights`.

    Raises:
        ConfigError: `config.head.grid` is not the map that an aerial image of `preprocess.aerial_input_px` gives.
        CheckpointError: The backbone's weights cannot be read or do not fit.
    """
    model = CrossViewModel(config, preprocess)
    source = config.backbone.weights
    if source is not None:
        weights = read_weights(source)
        for trunk in model.trunks:
            trunk.load_weights(weights, source=source)
    return model


def _trunk(config: BackboneConfig) -> Trunk | TimmTrunk:
    return Trunk(config) if config.kind == "vgg" else TimmTrunk(config)


def _require_grid(config: ModelConfig, aerial_map: tuple[int, int], aerial_size_px: tuple[int, int]) -> None:
    if aerial_map != config.head.grid:
        raise ConfigError(
            f"model.head.grid: {list(config.head.grid)} is not the map {list(aerial_map)} that an aerial image of "
            f"{list(aerial_size_px)} px leaves after the backbone and a stride of {config.head.stride}; "
            f"set it to {list(aerial_map)} or change preprocess.aerial_size_px"
            " (preprocess.ground_size_px where preprocess.polar unrolls it)"
        )


def _projection(in_channels: int, head: HeadConfig) -> SameConv2d:
    projection = SameConv2d(in_channels, head.channels, kernel_size=3, stride=head.stride)
    nn.init.kaiming_normal_(projection.weight, nonlinearity="relu")
    nn.init.zeros_(projection.bias)  # type: ignore[arg-type]  # typed optional, made here with bias
    return projection


def _descriptor(features: Tensor) -> Tensor:
    """Flatten [B, C, h, w] in the order h, w, C (C fastest), as the official graph does, and normalise."""
    return _unit(features.permute(0, 2, 3, 1).flatten(1))


def _unit(values: Tensor) -> Tensor:
    with torch.autocast(values.device.type, enabled=False):
        return functional.normalize(at_least_float32(values), dim=1)
