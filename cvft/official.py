"""The variables of the authors' TensorFlow graph in the names and layouts of `cvft.model`.

Official names: `VGG_grd/conv1_1/{weights,biases}` to `VGG_grd/conv5_3`, the same under `VGG_sat`, `grd_conv`,
`sat_conv`, `ot_grd_branchot_conv` and `ot_grd_branchot_fc`. Kernels are [height, width, in, out] there and [out, in,
height, width] here; the fully connected layer is [in, out] there and [out, in] here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvft.backbone import convolution_positions
from cvft.config import BackboneConfig
from cvft.model import CrossViewModel
from cvft.tensor_files import require_same_tensors, shapes

# What a training run leaves beside the weights: the optimizer's slots and the counters, under any name scope.
_TRAINING_STATE = re.compile(r"/(Adam|Momentum|RMSProp)(_\d+)?$|(^|/)(beta[12]_power|global_step)(_\d+)?$")
_SUFFIXES = {"weight": "weights", "bias": "biases"}
_TRUNKS = {"ground_trunk": "VGG_grd", "aerial_trunk": "VGG_sat"}
_LAYERS = {
    "ground_projection": "grd_conv",
    "aerial_projection": "sat_conv",
    "transport.score": "ot_grd_branchot_conv",
    "transport.cost": "ot_grd_branchot_fc",
}
_CONVOLUTIONS = {
    position: f"conv{block}_{step}"
    for block, positions in enumerate(convolution_positions(BackboneConfig().blocks), start=1)
    for step, position in enumerate(positions, start=1)
}


def weight_names(names: Iterable[str]) -> list[str]:
    """Return the names of an official checkpoint that are weights; its optimizer slots and counters are left out."""
    return [name for name in names if not _TRAINING_STATE.search(name)]


def official_head(names: Iterable[str]) -> Literal["cvft", "conv", "global_pool"]:
    """Return the head whose variables an official checkpoint holds."""
    scopes = {name.partition("/")[0] for name in names}
    if "ot_grd_branchot_fc" in scopes:
        return "cvft"
    return "conv" if "grd_conv" in scopes else "global_pool"


def official_state(
    tensors: Mapping[str, NDArray[np.float32]], model: CrossViewModel, *, source: str
) -> dict[str, Tensor]:
    """Convert the official variables into a state dict for `model`.

    Args:
        tensors: Official variables by name; optimizer slots and counters among them are ignored.
        model: A network of the official configuration, with the head that the variables are for.
        source: Where the variables come from, for the message.

    Raises:
        CheckpointError: A variable is missing, unknown or of another shape; the first few are named.
    """
    state = model.state_dict()
    names = {key: _official_name(key) for key in state}
    given = {name: tensors[name] for name in weight_names(tensors)}
    expected = {names[key]: _official_shape(shape) for key, shape in shapes(state).items()}
    require_same_tensors(expected, {name: array.shape for name, array in given.items()}, source=source)
    return {key: _convert(given[name]) for key, name in names.items()}


def _official_name(key: str) -> str:
    layer, _, kind = key.rpartition(".")
    if layer in _LAYERS:
        return f"{_LAYERS[layer]}/{_SUFFIXES[kind]}"
    trunk, _, position = layer.split(".")
    return f"{_TRUNKS[trunk]}/{_CONVOLUTIONS[position]}/{_SUFFIXES[kind]}"


def _official_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[2:], *shape[1::-1]) if len(shape) > 1 else shape


def _convert(array: NDArray[np.float32]) -> Tensor:
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
        array = array.T
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
