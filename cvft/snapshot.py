"""Writing checkpoints: a copy of everything in host memory first, files from it afterwards.

Between the two the training may go on, so that hashing and writing can be left to another thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cvft.checkpoint import (
    FORMAT,
    INFO_FILE,
    MODEL_FILE,
    SEAL,
    TRAINING_FILE,
    CheckpointInfo,
    State,
    own_state,
    seal,
    state_file,
    trained_parameters,
)
from cvft.configuration import to_plain
from cvft.errors import CheckpointError
from cvft.model import CrossViewModel
from cvft.optimizer_state import collect_optimizer_state


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A checkpoint in host memory; nothing in it changes while the training goes on.

    Attributes:
        document: The content of `checkpoint.json` but for the hashes.
        tensors: The tensors of each file by name, on the CPU.
    """

    document: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield name and content of each file, one in memory at a time, `checkpoint.json` last."""
        hashes = {}
        for name, tensors in self.tensors.items():
            data = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()})
            hashes[name] = hashlib.sha256(data).hexdigest()
            yield name, data
        document = {**self.document, "files": hashes}
        yield INFO_FILE, json.dumps({**document, SEAL: seal(document)}, indent=2).encode()


def take_snapshot(
    *,
    model: CrossViewModel,
    info: CheckpointInfo,
    optimizer: Optimizer | None = None,
    loss: nn.Module | None = None,
    states: Mapping[str, State] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """Copy all that a checkpoint holds into host memory.

    Args:
        model: The network itself, without a DDP wrapper.
        info: What to say about it.
        optimizer: Adam or AdamW over the parameters of the network and the loss; without it the training cannot be
            resumed from here.
        loss: The loss, where it has parameters of its own; goes with `optimizer`.
        states: What else is to be kept, by owner.
        weights: What stands for the network's own tensors, such as their average over steps.

    Raises:
        TypeError: `info.training` or a state's values are no plain JSON.
    """
    states = states or {}
    document = {"format": FORMAT, **to_plain(info)}
    tensors = {MODEL_FILE: _copy(model.state_dict() if weights is None else weights)}
    if optimizer is not None:
        slots, document["optimizer_groups"] = collect_optimizer_state(optimizer, trained_parameters(model, loss))
        tensors[TRAINING_FILE] = _copy(slots | own_state(loss))
    document["state"] = {owner: state.values for owner, state in states.items()}
    tensors |= {state_file(owner): _copy(state.tensors) for owner, state in states.items() if state.tensors}
    return Snapshot(document=json.loads(json.dumps(document)), tensors=tensors)


def save_checkpoint(
    directory: Path,
    *,
    model: CrossViewModel,
    info: CheckpointInfo,
    optimizer: Optimizer | None = None,
    loss: nn.Module | None = None,
    states: Mapping[str, State] | None = None,
) -> None:
    """Write a checkpoint at once, as `write_snapshot` does; the other arguments are those of `take_snapshot`.

    Raises:
        CheckpointError: The place cannot be written.
    """
    write_snapshot(directory, take_snapshot(model=model, info=info, optimizer=optimizer, loss=loss, states=states))


def write_snapshot(directory: Path, snapshot: Snapshot, *, guard: Callable[[], None] | None = None) -> None:
    """Write a checkpoint; never half of one stands in `directory`.

    It is written beside its place and moved there at the end. An older checkpoint there steps aside first: if the
    process dies in that instant, it is found beside, as `.<name>.<process>.old`.

    Args:
        directory: Its place; an older checkpoint there is replaced.
        snapshot: What to write.
        guard: Called when all is written, before it is moved to its place; what it raises leaves nothing behind.

    Raises:
        CheckpointError: The place cannot be written.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, data in snapshot.files():
            _write(temporary / name, data)
        if guard is not None:
            guard()
        _publish(temporary, directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot write the checkpoint: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, directory: Path) -> None:
    """Move a finished directory to its place; an older one steps aside: no rename replaces a full directory."""
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    if directory.exists():
        os.replace(directory, aside)
    try:
        os.replace(temporary, directory)
    except OSError:
        if aside.exists():
            os.replace(aside, directory)
        raise
    shutil.rmtree(aside, ignore_errors=True)
