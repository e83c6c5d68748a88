"""Reading tensors from files and holding them strictly against what a model expects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251  the name of an error alone: what weights_only=True raises
from urllib.parse import urlparse

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cvft.errors import CheckpointError

_MAX_NAMED = 3
_READ_ERRORS = (OSError, RuntimeError, ValueError, EOFError, UnpicklingError, safetensors.SafetensorError)


def require_same_tensors(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], *, source: str
) -> None:
    """Refuse tensors that are not exactly the expected names with the expected shapes.

    Args:
        expected: Shape by name, as the model has them.
        given: Shape by name, as `source` has them.
        source: Where `given` comes from, for the message.

    Raises:
        CheckpointError: A tensor is missing, unknown or of another shape; the first few are named.
    """
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is unknown to this model" for name in given if name not in expected]
    problems += [
        f"{name} has shape {list(given[name])} where {list(shape)} is expected"
        for name, shape in expected.items()
        if name in given and tuple(given[name]) != tuple(shape)
    ]
    if problems:
        rest = f" and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        raise CheckpointError(f"{source} does not fit the model: {', '.join(problems[:_MAX_NAMED])}{rest}")


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read_weights(location: str) -> dict[str, Tensor]:
    """Read published weights from a local file or an http(s) URL; only plain tensors are ever loaded.

    A `.safetensors` file is read as such, anything else through `torch.load(weights_only=True)`. A download is kept in
    torch.hub's folder; a name of torchvision's form `name-<hash>.pth` is checked against its hash.

    Raises:
        CheckpointError: The file cannot be had, is damaged or holds anything but tensors by name.
    """
    try:
        path = _download(location) if urlparse(location).scheme in ("http", "https") else Path(location)
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251  tensors alone
    except _READ_ERRORS as error:
        raise CheckpointError(f"{location}: cannot read these weights: {first_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{location}: holds no plain mapping of names to tensors; save the model's state_dict alone"
        )
    return content


def first_line(error: Exception) -> str:
    """Return what an error says in its first line; torch and TensorFlow explain over many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _download(url: str) -> Path:
    name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([0-9a-f]{8,})\.", name)
        torch.hub.download_url_to_file(url, str(path), digest.group(1) if digest else None)
    return path
