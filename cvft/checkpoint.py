"""Checkpoints: a directory of safetensors and JSON, whole or absent, never a pickle.

    model.safetensors         the network's tensors
    training.safetensors      the tensors of the optimizer and of the loss, where a training can go on
    state-<owner>.safetensors further tensors by owner: the loss curve, an average of the weights, mined neighbours
    checkpoint.json           configuration, preprocessing, position, manifest digest, the SHA-256 of each tensor file,
                              and its own

`cvft.snapshot` writes them. Every file is held against its hash when read, so that a flipped bit anywhere is found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cvft.config import ModelConfig, PreprocessConfig
from cvft.configuration import dotted_values, parse, to_plain
from cvft.errors import CheckpointError, ConfigError
from cvft.model import CrossViewModel
from cvft.optimizer_state import apply_optimizer_state
from cvft.tensor_files import require_same_tensors, shapes

FORMAT = "cvft-checkpoint"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 had neither `epoch_step` nor further state, and its JSON no hash of its own
MODEL_FILE = "model.safetensors"
TRAINING_FILE = "training.safetensors"
INFO_FILE = "checkpoint.json"
SEAL = "sha256"
_LOSS_PREFIX = "loss."
# Keys of the JSON that are no fields of CheckpointInfo, or that the typed parser has no words for.
_OTHER_KEYS = ("format", "files", "optimizer_groups", "state", "training", SEAL)


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    Attributes:
        model: The network's configuration.
        preprocess: What its input was in training; other input makes the weights worthless.
        step: Optimizer steps done.
        epoch: Whole epochs done.
        epoch_step: Steps done in the epoch after those: the sampler's position.
        manifest_digest: Digest of the manifest trained on; none for imported weights.
        metrics: Numbers by name, as evaluated at this step.
        training: Plain JSON that the training loop needs to go on (history, best so far).
        format_version: Version of this layout.
    """

    model: ModelConfig
    preprocess: PreprocessConfig
    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    manifest_digest: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class State:
    """What one owner within a training adds to its checkpoints, and gets back when the training goes on.

    Attributes:
        values: Plain JSON.
        tensors: Tensors by name, of any type and on any device; they come back on the CPU.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def state_file(owner: str) -> str:
    """Return the name of the file with an owner's tensors."""
    return f"state-{owner}.safetensors"


def seal(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a checkpoint's JSON in one canonical spelling, its own entry left out."""
    rest = {key: value for key, value in document.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_info(directory: Path) -> CheckpointInfo:
    """Read what a checkpoint says about itself, without its tensors.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, or a newer version wrote it.
    """
    return _info(_document(directory), directory)


def file_hashes(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a checkpoint but `checkpoint.json`, as that one states them.

    Raises:
        CheckpointError: As in `read_info`.
    """
    return dict(_document(directory)["files"])


def verify_checkpoint(directory: Path, *, is_model_alone: bool = False) -> None:
    """Hold every file of a checkpoint against its hash, without loading any.

    Args:
        directory: The checkpoint.
        is_model_alone: Look at the network's tensors only: a registered model has no others.

    Raises:
        CheckpointError: A file is missing, truncated or changed; it is named.
    """
    hashes = file_hashes(directory)
    for name in (MODEL_FILE,) if is_model_alone else hashes:
        _read_file(directory, name, hashes)


def read_state(directory: Path, owner: str) -> State | None:
    """Return what an owner added to a checkpoint; None if it added nothing.

    Raises:
        CheckpointError: The checkpoint is missing or damaged.
    """
    document = _document(directory)
    values = document.get("state", {}).get(owner)
    if values is None:
        return None
    has_tensors = state_file(owner) in document["files"]
    return State(
        values=values, tensors=_read_tensors(directory, state_file(owner), document["files"]) if has_tensors else {}
    )


def load_model(
    directory: Path, *, preprocess: PreprocessConfig | None = None, allow_other_preprocess: bool = False
) -> tuple[CrossViewModel, CheckpointInfo]:
    """Build the network of a checkpoint, in evaluation mode on the CPU.

    Args:
        directory: The checkpoint.
        preprocess: The input that the network will be given; none means the checkpoint's own.
        allow_other_preprocess: Accept input prepared otherwise than in training.

    Raises:
        CheckpointError: The checkpoint is missing or damaged, or `preprocess` is not the one it was trained with.
        ConfigError: Other preprocessing was allowed, but its image size does not give the network's grid.
    """
    document = _document(directory)
    info = _info(document, directory)
    differences = _differences(info.preprocess, preprocess or info.preprocess)
    if differences and not allow_other_preprocess:
        raise CheckpointError(
            f"{directory} was trained with other preprocessing: {differences}; "
            "use the checkpoint's own, or allow_other_preprocess=True if you mean it"
        )
    model = CrossViewModel(info.model, preprocess or info.preprocess)
    _load_state(model, document, directory)
    return model.eval(), info


def restore_training(
    directory: Path,
    *,
    model: CrossViewModel,
    preprocess: PreprocessConfig,
    optimizer: Optimizer,
    loss: nn.Module | None = None,
) -> CheckpointInfo:
    """Put a checkpoint's tensors into a network, its loss and optimizer; it goes on to the bit as if never stopped.

    Args:
        directory: The checkpoint.
        model: A network of the checkpoint's configuration, without a DDP wrapper.
        preprocess: How its input will be made; the same as before.
        optimizer: Adam or AdamW over the parameters of the network and the loss.
        loss: The loss, where it has parameters of its own.

    Raises:
        CheckpointError: The checkpoint is missing or damaged, holds no optimizer state, or is of another configuration.
    """
    document = _document(directory)
    info = _info(document, directory)
    for what, then, now in (("model", info.model, model.config), ("preprocessing", info.preprocess, preprocess)):
        if differences := _differences(then, now):
            raise CheckpointError(
                f"{directory} is of another {what}: {differences}; resume with the training's own configuration"
            )
    if TRAINING_FILE not in document["files"] or "optimizer_groups" not in document:
        raise CheckpointError(
            f"{directory} holds no optimizer state: it can be evaluated, but no training can go on from it"
        )
    tensors = _read_tensors(directory, TRAINING_FILE, document["files"])
    slots = {name: tensors.pop(name) for name in list(tensors) if ":" in name}
    source = str(directory / TRAINING_FILE)
    require_same_tensors(shapes(own_state(loss)), shapes(tensors), source=source)
    _load_state(model, document, directory)
    if loss is not None:
        loss.load_state_dict({name.removeprefix(_LOSS_PREFIX): tensor for name, tensor in tensors.items()})
    groups = document["optimizer_groups"]
    apply_optimizer_state(optimizer, trained_parameters(model, loss), tensors=slots, groups=groups, source=source)
    return info


def own_state(loss: nn.Module | None) -> dict[str, Tensor]:
    """Return the loss's tensors under names that no tensor of the network and no slot of the optimizer has."""
    return {} if loss is None else {f"{_LOSS_PREFIX}{name}": tensor for name, tensor in loss.state_dict().items()}


def trained_parameters(model: nn.Module, loss: nn.Module | None) -> dict[str, nn.Parameter]:
    """Return the parameters of the network and of the loss by the names that the optimizer's state is kept under."""
    of_loss = {} if loss is None else dict(loss.named_parameters(prefix=_LOSS_PREFIX.removesuffix(".")))
    return {**dict(model.named_parameters()), **of_loss}


def _document(directory: Path) -> dict[str, Any]:
    path = directory / INFO_FILE
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot read it ({error.strerror}); give the directory of a checkpoint"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; take another checkpoint") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this project: its `format` is not {FORMAT!r}")
    version = document.get("format_version")
    if version not in READABLE_VERSIONS:
        readable = " and ".join(str(number) for number in READABLE_VERSIONS)
        raise CheckpointError(
            f"{path} has format_version {version!r}, this release reads {readable}; use its own release"
        )
    if version > 1 and document.get(SEAL) != seal(document):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one it states; take another checkpoint")
    if not isinstance(document.get("files"), dict) or MODEL_FILE not in document["files"]:
        raise CheckpointError(f"{path} is damaged: `files` names no {MODEL_FILE}; take another checkpoint")
    return document


def _info(document: Mapping[str, Any], directory: Path) -> CheckpointInfo:
    own = {key: value for key, value in document.items() if key not in _OTHER_KEYS}
    try:
        return replace(parse(CheckpointInfo, own), training=document.get("training", {}))
    except ConfigError as error:
        raise CheckpointError(f"{directory / INFO_FILE} cannot be used: {error}") from error


def _differences(trained: object, here: object) -> str:
    """Name the fields in which two configurations of one class differ, by dotted key and with both values."""
    trained_values, here_values = dotted_values(to_plain(trained)), dotted_values(to_plain(here))
    return ", ".join(
        f"{key} was {value} and is {here_values[key]} here"
        for key, value in trained_values.items()
        if here_values[key] != value
    )


def _load_state(model: CrossViewModel, document: Mapping[str, Any], directory: Path) -> None:
    state = _read_tensors(directory, MODEL_FILE, document["files"])
    require_same_tensors(shapes(model.state_dict()), shapes(state), source=str(directory / MODEL_FILE))
    model.load_state_dict(state)


def _read_tensors(directory: Path, name: str, hashes: Mapping[str, str]) -> dict[str, Tensor]:
    return dict(safetensors.torch.load(_read_file(directory, name, hashes)))


def _read_file(directory: Path, name: str, hashes: Mapping[str, str]) -> bytes:
    path = directory / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it ({error.strerror}); the checkpoint is incomplete") from error
    if hashlib.sha256(data).hexdigest() != hashes[name]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {INFO_FILE}; take another checkpoint")
    return data
