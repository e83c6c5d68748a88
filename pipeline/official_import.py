"""Importing the authors' TensorFlow checkpoint: the one place that needs TensorFlow, and only when called."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cvft.checkpoint import CheckpointInfo
from cvft.config import HeadConfig, ModelConfig, PreprocessConfig
from cvft.errors import CheckpointError, MissingExtraError
from cvft.model import CrossViewModel
from cvft.official import official_head, official_state, weight_names
from cvft.snapshot import save_checkpoint
from cvft.tensor_files import first_line


def import_official(
    checkpoint_prefix: str, out_dir: Path, *, head: Literal["cvft", "conv", "global_pool"] | None = None
) -> CheckpointInfo:
    """Turn an official TensorFlow checkpoint into one of ours, with the paper's configuration and preprocessing.

    Args:
        checkpoint_prefix: Path without `.index` and `.data-...`, as in `.../model.ckpt`.
        out_dir: Directory of the new checkpoint.
        head: What the weights are for; none reads it off the variables' names.

    Returns:
        What the new checkpoint says about itself.

    Raises:
        MissingExtraError: TensorFlow is not installed.
        CheckpointError: The checkpoint is missing or damaged, or a variable is missing, unknown or of another shape.
    """
    variables = _read_variables(checkpoint_prefix)
    config = ModelConfig(head=HeadConfig(kind=head or official_head(variables)))
    preprocess = PreprocessConfig()
    model = CrossViewModel(config, preprocess)
    model.load_state_dict(official_state(variables, model, source=checkpoint_prefix))
    info = CheckpointInfo(model=config, preprocess=preprocess, training={"imported_from": Path(checkpoint_prefix).name})
    save_checkpoint(out_dir, model=model, info=info)
    return info


def _read_variables(checkpoint_prefix: str) -> dict[str, NDArray[np.float32]]:
    """Read the weights of a TensorFlow checkpoint by name, without the optimizer's slots."""
    tensorflow = _tensorflow()
    try:
        reader = tensorflow.train.load_checkpoint(checkpoint_prefix)
        names = weight_names(reader.get_variable_to_shape_map())
        return {name: reader.get_tensor(name) for name in sorted(names)}
    except (tensorflow.errors.OpError, ValueError, RuntimeError, LookupError) as error:
        raise CheckpointError(
            f"{checkpoint_prefix}: cannot read this TensorFlow checkpoint: {first_line(error)}; "
            "give the path without .index and .data-00000-of-00001"
        ) from error


def _tensorflow() -> Any:
    try:
        return importlib.import_module("tensorflow")
    except ImportError as error:
        raise MissingExtraError(
            'TensorFlow reads the official checkpoint and is not installed: pip install "cvft[tensorflow]"'
        ) from error
