"""Trunks of the package timm, by name; the only place that knows timm, which is loaded when such a trunk is built.

Shape letters: B images, H x W input, C channels, h x w map.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cvft.config import BackboneConfig
from cvft.errors import ConfigError
from cvft.noise import derive, drawn_noise, dropout
from cvft.tensor_files import require_same_tensors, shapes

_PLACE = 1  # of the dropout's noise


class TimmTrunk(nn.Module):
    """The last feature map of a network of timm: [B, 3, H, W] normalised pixels to [B, C, h, w] features.

    What the map does not depend on (a classifier's norm, say) is not trained. Batch normalisation keeps its statistics:
    those of a batch would tie a pair's descriptor to the pairs beside it, and to the number of processes.

    Attributes:
        config: What the trunk was built from.
        out_channels: C.
        model: timm's own module.
    """

    def __init__(self, config: BackboneConfig) -> None:
        """Build the trunk with random weights.

        Raises:
            ConfigError: timm cannot be imported, does not know the name, or has no map for it; or there are not as many
                blocks to freeze.
        """
        super().__init__()
        self.config = config
        self.model = _create(str(config.name))
        self.train()
        self.out_channels = self.model.feature_info[-1]["num_chs"]
        for name in self._frozen_parameters():
            self.model.get_parameter(name).requires_grad_(False)
        for name in self._idle_parameters():
            self.model.get_parameter(name).requires_grad_(False)

    def train(self, mode: bool = True) -> TimmTrunk:
        """Switch between training and evaluation, except for batch normalisation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the features [B, C, h, w] of normalised pixels [B, 3, H, W].

        Args:
            image: [B, 3, H, W].
            noise: int32 [B], decides what dropout drops of the map while training; none draws it from torch's
                generator.
        """
        features = _last_map(self.model, image)
        if not self.training or self.config.dropout == 0:
            return features
        if noise is None:
            noise = drawn_noise(len(image), image.device)
        return dropout(features, self.config.dropout, derive(noise, _PLACE))

    def map_size(self, size_px: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of the features of an image of `size_px`, from a pass that computes nothing.

        Raises:
            ConfigError: The network cannot take images of that size.
        """
        _, _, height, width = self._shadow_pass(size_px)[1].shape
        return height, width

    def load_weights(self, weights: Mapping[str, Tensor], *, source: str) -> None:
        """Start from timm's tensors of the same name; those of the classifier are left out.

        Raises:
            CheckpointError: A tensor is missing, unknown or of another shape.
        """
        classifiers = self.model.pretrained_cfg.get("classifier") or ()
        prefixes = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
        used = {name: tensor for name, tensor in weights.items() if not name.startswith(prefixes)}
        require_same_tensors(shapes(self.model.state_dict()), shapes(used), source=source)
        self.model.load_state_dict(used)

    def recompute_activations(self) -> None:
        """Keep less for the backward pass and compute it again there, as timm does it for this network.

        Raises:
            ConfigError: timm does not do it for this network.
        """
        try:
            self.model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ConfigError(
                f"train.activation_checkpointing: timm has it for other networks, not for {self.config.name}; "
                "set it to false"
            ) from error

    def _frozen_parameters(self) -> list[str]:
        """List the parameters of timm's first `num_frozen_blocks` feature stages and of all that comes before them."""
        stages, count = [stage["module"] for stage in self.model.feature_info], self.config.num_frozen_blocks
        if count > len(stages):
            raise ConfigError(
                f"model.backbone.num_frozen_blocks: {count} must lie in [0, {len(stages)}], "
                f"the stages of {self.config.name}"
            )
        if count == 0:
            return []
        modules = [name for name, _ in self.model.named_modules()]
        inside = [place for place, name in enumerate(modules) if f"{name}.".startswith(f"{stages[count - 1]}.")]
        before = set(modules[: inside[-1] + 1])
        return [name for name, _ in self.model.named_parameters() if name.rpartition(".")[0] in before]

    @torch.enable_grad()
    def _idle_parameters(self) -> list[str]:
        """List the parameters that the map does not depend on."""
        size = self.model.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
        parameters, features = self._shadow_pass(size)
        gradients = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
        return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]

    def _shadow_pass(self, size_px: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        """Run tensors without data through the network; return its parameters and the map [1, C, h, w]."""
        own = {name: value.detach().to("meta").requires_grad_() for name, value in self.model.named_parameters()}
        state = own | {name: value.to("meta") for name, value in self.model.named_buffers()}
        image = torch.empty(1, 3, *size_px, device="meta")
        try:
            with torch.enable_grad():
                return own, functional_call(
                    _MapOf(self.model), {f"model.{name}": v for name, v in state.items()}, image
                )
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"model.backbone.name: {self.config.name} cannot take images of {list(size_px)} px: "
                f"{str(error).splitlines()[0]}; change the sizes in preprocess"
            ) from error


class _MapOf(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return _last_map(self.model, image)


def _last_map(model: Any, image: Tensor) -> Tensor:
    """Return the last feature map of a network of timm, normalised where the network does so."""
    options = {"indices": 1, "norm": True, "output_fmt": "NCHW", "intermediates_only": True}
    features: Tensor = model.forward_intermediates(image, **options)[-1]
    return features


def _create(name: str) -> Any:
    timm = _timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise ConfigError(f"model.backbone.name: timm {timm.__version__} knows no {name!r}; {hint}")
    try:
        with torch.device("meta"):
            takes_any_size = hasattr(timm.create_model(name, num_classes=0), "dynamic_img_size")
        model = timm.create_model(name, num_classes=0, **({"dynamic_img_size": True} if takes_any_size else {}))
    except RuntimeError as error:  # an unknown tag after the dot
        raise ConfigError(f"model.backbone.name: {name}: {str(error).splitlines()[0]}") from error
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
        raise ConfigError(f"model.backbone.name: timm gives no feature map of {name}; choose another network")
    return model


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        raise ConfigError(
            "model.backbone.kind: timm needs the package timm and a torchvision that fits this torch "
            f"({str(error).splitlines()[0]}); pip install 'cvft[timm]', or use vgg"
        ) from error
