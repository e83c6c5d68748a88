"""A local folder as `pipeline.storage.Store` uses it. Errors are the system's own; the store puts them into words."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

_HINTS = {
    errno.ENOSPC: "the disk is full; free some space or name another place",
    errno.EDQUOT: "the quota is used up; free some space or name another place",
    errno.EROFS: "the file system is read-only; name another place",
    errno.EACCES: "this user may not; change the permissions or name another place",
}
# What a shared disk answers while its server is away.
_PASSING = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
)
_BUFFER_BYTES = 1024 * 1024  # whole pages at a time: writing part of a page costs as much as all of it
# Names of files that are being written, or that only guard others: listings leave them out.
_TEMPORARY, _LOCK = ".tmp", ".lock"


class LocalFolder:
    """Files below `root`; paths are relative to it and use forward slashes."""

    scheme = "file"

    def __init__(self, root: Path) -> None:
        self.root = str(root)

    def status(self, path: str) -> tuple[int, str] | None:
        """Return bytes and a stamp of the file (its modification time), or None if there is none."""
        target = self.file(path)
        if not target.is_file():
            return None
        status = target.stat()
        return status.st_size, str(status.st_mtime_ns)

    def list(self, prefix: str) -> dict[str, tuple[int, str]]:
        """Return `status` of every file below the folder `prefix`."""
        found = {}
        folders = [self.file(prefix)]
        while folders:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(Path(entry.path))
                    elif entry.is_file() and not _is_hidden(entry.name):
                        with contextlib.suppress(FileNotFoundError):  # taken away meanwhile: the others still count
                            status = entry.stat()
                            found[os.path.relpath(entry.path, self.root)] = (status.st_size, str(status.st_mtime_ns))
        return found

    def open_input(self, path: str) -> BinaryIO:
        """Open the file for reading."""
        return self.file(path).open("rb")

    def read_range(self, path: str, start: int, num_bytes: int) -> bytes:
        """Return at most `num_bytes` from `start` on; fewer where the file ends."""
        with self.file(path).open("rb", buffering=0) as stream:
            return os.pread(stream.fileno(), num_bytes, start)

    def read_versioned(self, path: str) -> tuple[bytes, str] | None:
        """Return the content and its hash, or None if there is no file."""
        try:
            data = self.file(path).read_bytes()
        except FileNotFoundError:
            return None
        return data, blake3(data).hexdigest()

    def open_output(self, path: str) -> LocalOutput:
        """Begin a file that appears when it is committed."""
        return LocalOutput(self.file(path))

    def create(self, path: str, data: bytes) -> bool:
        """Write the file unless there is one; return whether this call made it."""
        output = self.open_output(path)
        try:
            output.write(data)
            return output.commit_new()
        finally:
            output.abort()

    def replace(self, path: str, data: bytes, version: str) -> bool:
        """Write the file if its content still has this hash; return whether it was written."""
        target = self.file(path)
        with _locked(target):
            present = self.read_versioned(path)
            if present is None or present[1] != version:
                return False
            output = LocalOutput(target)
            try:
                output.write(data)
                output.commit()
            finally:
                output.abort()
        return True

    def delete(self, path: str) -> None:
        """Delete the file if there is one."""
        self.file(path).unlink(missing_ok=True)

    def delete_folder(self, path: str) -> None:
        """Delete the folder and all below it."""
        shutil.rmtree(self.file(path))

    def file(self, path: str) -> Path:
        """Return the file's full path."""
        return Path(self.root, path)

    def explain(self, error: Exception) -> str:
        """Say in one line what is wrong and what to do."""
        if not isinstance(error, OSError):
            return str(error)
        return _HINTS.get(error.errno or 0) or error.strerror or str(error)

    def may_pass(self, error: Exception) -> bool:
        """Tell whether the same may succeed later without anybody mending anything."""
        return may_pass(error)


def may_pass(error: BaseException | None) -> bool:
    """Tell whether an error of the system's is one that a shared disk gives while its server is away."""
    return isinstance(error, OSError) and error.errno in _PASSING


class LocalOutput:
    """A file under a temporary name beside its own until it is whole and on the disk."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_TEMPORARY}")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._temporary.open("wb", buffering=_BUFFER_BYTES)

    def write(self, data: bytes) -> None:
        """Append."""
        self._stream.write(data)

    def commit(self) -> None:
        """Give the file its name."""
        self._sync()
        self._temporary.replace(self._target)

    def commit_new(self) -> bool:
        """Give the file its name unless that is taken; return whether it got it."""
        self._sync()
        try:
            os.link(self._temporary, self._target)  # unlike a rename, a link refuses an existing name
        except FileExistsError:
            return False
        return True

    def abort(self) -> None:
        """Leave nothing of it; after a commit, nothing but the file itself."""
        self._temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what could not be written cannot be written now either
            self._stream.close()

    def _sync(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and name.endswith((_TEMPORARY, _LOCK))


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of a file that is to be replaced, against other threads, processes and nodes of a shared disk."""
    lock = target.with_name(f".{target.name}{_LOCK}")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        # Shared disks lock a file that is open for writing alone.
        with lock.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_same_file(stream, lock):
                continue  # whoever held it has taken it away; others may hold a new one
            try:
                yield
            finally:
                lock.unlink()
            return


def _is_same_file(stream: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
