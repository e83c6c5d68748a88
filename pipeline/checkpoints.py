"""Where a training's checkpoints live: one folder each, `step-00000350`, in a local folder or an object store.

A checkpoint counts once its `checkpoint.json` is there, which is uploaded last, and as long as every file has its hash.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from cvft.checkpoint import INFO_FILE, file_hashes, verify_checkpoint
from cvft.errors import CheckpointError, StoreError, StoreUnavailableError
from cvft.snapshot import Snapshot, write_snapshot
from pipeline.local_files import may_pass
from pipeline.storage import Store

_NAME = re.compile(r"step-\d+")
_LEFT_OVER = re.compile(r"\.step-\d+\.\d+\.(tmp|old)")  # by a process that died while it wrote, see `write_snapshot`
_LOGGER = logging.getLogger(__name__)


def checkpoint_name(step: int) -> str:
    """Name the checkpoint after so many steps."""
    return f"step-{step:08d}"


class CheckpointFolder:
    """The checkpoints of one training."""

    def __init__(self, uri: str) -> None:
        self._store = Store.from_uri(uri)

    def names(self) -> list[str]:
        """List the finished checkpoints, oldest first; whether they are whole is not looked at."""
        # Folders of other names are being written, or were, or are not ours.
        paths = (path.partition("/") for path in self._store.list())
        return sorted((name for name, _, file in paths if _NAME.fullmatch(name) and file == INFO_FILE), key=_step)

    def uri(self, name: str = "") -> str:
        """Return the URI of a checkpoint, as `evaluate --checkpoint` takes it, or that of the folder."""
        return self._store.uri(name)

    def write(self, name: str, snapshot: Snapshot, *, guard: Callable[[], None] | None = None) -> None:
        """Write a checkpoint; it counts when this returns, and not before its last file is written.

        Args:
            name: See `checkpoint_name`.
            snapshot: What to write.
            guard: Called before anything of that name is touched, and before it begins to count; what it raises
                prevents both.

        Raises:
            CheckpointError: The local place cannot be written.
            StoreError: The store refuses it; a `StoreUnavailableError` if it may not do so for ever.
        """
        local = self._store.local_path(name)
        if local is None:
            self._upload(name, snapshot, guard or _no_guard)
            return
        try:
            write_snapshot(local, snapshot, guard=guard)
        except CheckpointError as error:
            if may_pass(error.__cause__):
                raise StoreUnavailableError(str(error)) from error
            raise

    def _upload(self, name: str, snapshot: Snapshot, guard: Callable[[], None]) -> None:
        guard()
        self._store.delete(f"{name}/{INFO_FILE}")  # of an older one whose files are about to be replaced
        for file, data in snapshot.files():
            if file == INFO_FILE:
                guard()
            self._store.write_bytes(f"{name}/{file}", data)

    def copy_from(self, directory: Path, name: str) -> None:
        """Copy a local checkpoint here under a name; it counts once its last file is here.

        Raises:
            CheckpointError: It is damaged.
            StoreError: The store refuses it.
        """
        verify_checkpoint(directory)
        for file in (*file_hashes(directory), INFO_FILE):
            self._store.write_bytes(f"{name}/{file}", (directory / file).read_bytes())

    def keep(self, names: Iterable[str]) -> None:
        """Delete every other checkpoint and what there is of unfinished ones; nobody else may be writing.

        `checkpoint.json` goes first, so that no half of a checkpoint ever counts.
        """
        paths = self._store.list()
        others = {path.partition("/")[0] for path in paths} - set(names)
        for name in sorted(other for other in others if _NAME.fullmatch(other) or _LEFT_OVER.fullmatch(other)):
            if f"{name}/{INFO_FILE}" in paths:
                self._store.delete(f"{name}/{INFO_FILE}")
            self._store.delete_folder(name)

    def newest_whole(self, *, cache: Path) -> tuple[str, Path] | None:
        """Find the newest checkpoint whose every file has its hash; a damaged one is named in a warning.

        Args:
            cache: As in `fetch`.

        Returns:
            Its name and its local directory; None if there is no checkpoint at all.

        Raises:
            CheckpointError: There are checkpoints, and all of them are damaged.
            StoreError: The store cannot be read.
        """
        names = self.names()
        for name in reversed(names):
            try:
                directory = fetch(self.uri(name), cache=cache)
                verify_checkpoint(directory)
            except CheckpointError as error:
                _LOGGER.warning("%s cannot be used, taking the one before it: %s", name, error)
            else:
                return name, directory
        if names:
            raise CheckpointError(
                f"{self.uri()}: all {len(names)} checkpoints are damaged ({', '.join(names)}); bring one back from a"
                " backup, or delete this folder to train anew"
            )
        return None


def _no_guard() -> None:
    pass


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def fetch(uri: str, *, cache: Path) -> Path:
    """Return a checkpoint as a local directory; a remote one is copied into `cache` once.

    Raises:
        CheckpointError: There is no checkpoint at `uri`, it is damaged in a remote store, or its copy cannot be
            written.
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
    if (target / INFO_FILE).exists():
        try:
            verify_checkpoint(target)
        except CheckpointError as error:
            _LOGGER.warning("fetching %s anew: %s", uri, error)
            shutil.rmtree(target, ignore_errors=True)
        else:
            return target
    _copy(store, target)
    return target


def _copy(store: Store, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            whole = Path(folder) / "checkpoint"
            whole.mkdir()
            _copy_file(store, INFO_FILE, whole)
            for name in file_hashes(whole):
                _copy_file(store, name, whole)
            try:
                verify_checkpoint(whole)
            except CheckpointError as error:
                raise CheckpointError(f"{store.uri()}: {error}") from error
            whole.rename(target)
    except OSError as error:
        if not (target / INFO_FILE).exists():  # otherwise another process was faster, and its copy is equal
            raise CheckpointError(f"{target}: cannot keep a copy of {store.uri()} here: {error.strerror}") from error


def _copy_file(store: Store, name: str, folder: Path) -> None:
    try:
        with store.open_input(name) as source, (folder / name).open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    except StoreError:
        if store.exists(name):
            raise
        raise CheckpointError(f"{store.uri(name)}: is missing; the checkpoint is incomplete") from None
