"""An optimizer's state as named tensors and plain JSON, so that a training goes on to the bit without any pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cvft.errors import CheckpointError


def collect_optimizer_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the state of an optimizer over `parameters` whose slots are all tensors, as those of Adam and AdamW are.

    Returns:
        The tensors by `<parameter's name>:<slot>`, and the parameter groups as plain data with parameters by name.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    tensors = {
        f"{names[parameter]}:{slot}": value
        for parameter, state in optimizer.state.items()
        for slot, value in state.items()
    }
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    return tensors, groups


def apply_optimizer_state(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    *,
    tensors: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
    source: str,
) -> None:
    """Put a collected state into an optimizer over the same parameters in the same groups.

    Raises:
        CheckpointError: The optimizer has other parameters or groups than the state.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    own_groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if [group["params"] for group in groups] != own_groups:
        raise CheckpointError(
            f"{source}: its optimizer state is for other parameter groups; resume with the training's configuration"
        )
    order = {name: index for index, name in enumerate(name for group in own_groups for name in group)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition(":")
        if name not in order or tensor.shape not in (parameters[name].shape, torch.Size([])):
            raise CheckpointError(
                f"{source}: the optimizer's {key} of shape {list(tensor.shape)} has no parameter to go with"
            )
        state.setdefault(order[name], {})[slot] = _laid_out_as(parameters[name], tensor)
    # JSON has no tuples; Adam's betas are one.
    options = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()} for group in groups
    ]
    numbered = [
        {**group, "params": [order[name] for name in names_of]}
        for group, names_of in zip(options, own_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": numbered})


def _laid_out_as(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """Give a moment the parameter's own strides: with others, the update may round differently."""
    if tensor.shape != parameter.shape:
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
