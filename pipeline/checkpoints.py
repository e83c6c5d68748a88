"""Where a training's checkpoints live: one folder each, `epoch-0007`, in a local folder or an object store.

A checkpoint counts once its `checkpoint.json` is there, which is uploaded last.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from cvft.checkpoint import INFO_FILE, CheckpointInfo, save_checkpoint
from cvft.errors import CheckpointError
from cvft.model import CrossViewModel
from pipeline.storage import Store

_INFO_PATH = re.compile(rf"epoch-\d+/{re.escape(INFO_FILE)}")


def checkpoint_name(epoch: int) -> str:
    """Name the checkpoint after so many epochs."""
    return f"epoch-{epoch:04d}"


class CheckpointFolder:
    """The checkpoints of one training."""

    def __init__(self, uri: str) -> None:
        self._store = Store.from_uri(uri)

    def names(self) -> list[str]:
        """List the whole checkpoints, oldest first."""
        # Folders of other names are being written, or were, or are not ours.
        names = [path.partition("/")[0] for path in self._store.list() if _INFO_PATH.fullmatch(path)]
        return sorted(names, key=lambda name: int(name.removeprefix("epoch-")))

    def uri(self, name: str) -> str:
        """Return the URI of a checkpoint, as `evaluate --checkpoint` takes it."""
        return self._store.uri(name)

    def save(
        self, *, model: CrossViewModel, info: CheckpointInfo, optimizer: Optimizer, loss: nn.Module | None = None
    ) -> str:
        """Write the checkpoint of an epoch and return its name."""
        name = checkpoint_name(info.epoch)
        local = self._store.local_path(name)
        if local is not None:
            save_checkpoint(local, model=model, info=info, optimizer=optimizer, loss=loss)
            return name
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder) / name, model=model, info=info, optimizer=optimizer, loss=loss)
            files = sorted((Path(folder) / name).iterdir(), key=lambda path: path.name == INFO_FILE)
            for file in files:
                with file.open("rb") as source, self._store.open_output(f"{name}/{file.name}") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        return name

    def keep(self, names: set[str]) -> None:
        """Delete every other checkpoint, its `checkpoint.json` first so that no half of one ever counts."""
        for name in self.names():
            if name not in names:
                self._store.delete(f"{name}/{INFO_FILE}")
                self._store.delete_folder(name)


def fetch(uri: str, *, cache: Path) -> Path:
    """Return a checkpoint as a local directory; a remote one is copied into `cache` once.

    Raises:
        CheckpointError: There is no checkpoint at `uri`, or its copy cannot be written.
        StoreError: It cannot be read.
    """
    store = Store.from_uri(uri)
    if not store.exists(INFO_FILE):
        raise CheckpointError(f"{uri}: no checkpoint here ({INFO_FILE} is missing); `train` prints a checkpoint's URI")
    local = store.local_path("")
    if local is not None:
        return local
    # The information file holds the hashes of the others: equal text, equal checkpoint.
    target = cache / "checkpoints" / hashlib.sha256(store.read_bytes(INFO_FILE)).hexdigest()[:32]
    if not (target / INFO_FILE).exists():
        _copy(store, target)
    return target


def _copy(store: Store, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            whole = Path(folder) / "checkpoint"
            whole.mkdir()
            for name in store.list():
                with store.open_input(name) as source, (whole / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
            whole.rename(target)
    except OSError as error:
        if not (target / INFO_FILE).exists():  # otherwise another process was faster, and its copy is equal
            raise CheckpointError(f"{target}: cannot keep a copy of {store.uri()} here: {error.strerror}") from error
