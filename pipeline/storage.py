"""One small interface over local folders and object stores: `runs/shards`, `file:///data/shards`, `s3://bucket/prefix`.

An object store is a matter of configuration, see `pipeline.s3`. A `Store` is named by its URI, so a worker on another
node opens its own from the same string; it is cheap to make, and can be pickled.

What is promised: a file written here appears whole under its name or not at all, and leaves nothing behind when it does
not (locally a temporary file, fsync and a rename; in an object store the object's own rule, large ones in parts). A
create-only write has exactly one winner, and so has a compare-and-swap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from botocore.exceptions import BotoCoreError, ClientError
from pyarrow import fs

from cvft.errors import StoreError, StoreUnavailableError
from pipeline.local_files import LocalFolder
from pipeline.s3 import S3Folder

_Translate = Callable[[], AbstractContextManager[None]]


class FileStatus(NamedTuple):
    """What tells whether a file has changed.

    Attributes:
        num_bytes: Its size.
        stamp: Locally its time of modification in nanoseconds, in an object store its ETag.
    """

    num_bytes: int
    stamp: str


class Store:
    """A folder, local or remote; every path given to its methods is relative to it and uses forward slashes.

    Every method raises `StoreError`, one line that says what to do, where the place cannot be reached, read or written;
    a `StoreUnavailableError` if it may answer later by itself (see `pipeline.patience`).
    """

    def __init__(self, folder: LocalFolder | S3Folder) -> None:
        self._folder = folder

    @classmethod
    def from_uri(cls, uri: str | Path) -> Store:
        """Open the store that `uri` names; a local folder need not exist yet.

        Raises:
            StoreError: It is empty, its scheme is neither `file` nor `s3`, or it names no bucket.
        """
        text = str(uri)
        scheme, separator, rest = text.partition("://")
        if not text.strip():
            raise StoreError("an empty path names no folder; write `.` for the one you are in")
        if text.startswith("s3:/") and not separator:  # what pathlib and os.path make of a URI
            raise StoreError(f"{text}: is no path and no URI; write s3://bucket/prefix")
        if not separator:
            return cls(LocalFolder(Path(text).expanduser().absolute()))
        if scheme == "file":
            return cls(LocalFolder(Path(unquote(rest)).absolute()))
        if scheme == "s3":
            if not rest.partition("/")[0]:
                raise StoreError(f"{text}: names no bucket; write s3://bucket/prefix")
            return cls(S3Folder(rest))
        raise StoreError(f"{text}: unknown scheme {scheme!r}; use a local path, file:// or s3://")

    def uri(self, path: str = "") -> str:
        """Return the full name of `path`: an absolute path if local, else a URI."""
        full = f"{self._folder.root}/{path}" if path else self._folder.root
        return full if isinstance(self._folder, LocalFolder) else f"s3://{full}"

    @property
    def arrow(self) -> tuple[Any, str]:
        """The pyarrow file system and the path within it, for libraries that write there themselves."""
        if isinstance(self._folder, LocalFolder):
            return fs.LocalFileSystem(), self._folder.root
        with self._translate("", "open"):
            return self._folder.arrow(), self._folder.root

    def local_path(self, path: str) -> Path | None:
        """Return `path` as a file on this machine, or None in an object store."""
        return self._folder.file(path) if isinstance(self._folder, LocalFolder) else None

    def status(self, path: str) -> FileStatus | None:
        """Return size and stamp of the file at `path`, or None if there is none."""
        with self._translate(path, "look at"):
            status = self._folder.status(path)
        return None if status is None else FileStatus(*status)

    def exists(self, path: str) -> bool:
        """Tell whether there is a file at `path`."""
        return self.status(path) is not None

    def size(self, path: str) -> int | None:
        """Return the bytes of the file at `path`, or None if there is none."""
        status = self.status(path)
        return None if status is None else status.num_bytes

    def list(self, prefix: str = "") -> list[str]:
        """Return all files below the folder `prefix`, sorted; none if there is no such folder."""
        return list(self.list_sizes(prefix))

    def list_sizes(self, prefix: str = "") -> dict[str, FileStatus]:
        """Return size and stamp of all files below the folder `prefix`, sorted by path, from one listing."""
        with self._translate(prefix, "list"):
            found = self._folder.list(prefix)
        return {path: FileStatus(*status) for path, status in sorted(found.items())}

    def read_bytes(self, path: str) -> bytes:
        """Return the whole file."""
        with self.open_input(path) as stream:
            return bytes(stream.read())

    def read_range(self, path: str, start: int, num_bytes: int) -> bytes:
        """Return exactly `num_bytes` from the position `start` on.

        Raises:
            StoreError: The file ends before.
        """
        if num_bytes == 0:
            return b""
        with self._translate(path, "read"):
            data = self._folder.read_range(path, start, num_bytes)
        if len(data) != num_bytes:
            raise StoreError(f"{self.uri(path)}: has no bytes {start} to {start + num_bytes}, it ends before")
        return data

    def read_versioned(self, path: str) -> tuple[bytes, str] | None:
        """Return the whole file and its version, as `replace_bytes` takes it; None if there is no file."""
        with self._translate(path, "read"):
            return self._folder.read_versioned(path)

    @contextmanager
    def open_input(self, path: str) -> Iterator[Stream]:
        """Open a file for reading: `read(n)`, `seek(position)`."""
        translate = partial(self._translate, path, "read")
        with translate():
            stream = self._folder.open_input(path)
        try:
            yield Stream(stream, translate)
        finally:
            stream.close()

    @contextmanager
    def open_output(self, path: str) -> Iterator[Stream]:
        """Open a file for writing (`write(data)`); it appears under its name when the block ends without an error.

        An object is sent while it is written, from at most 64 MiB of parts in memory (see `pipeline.s3_upload`).
        """
        translate = partial(self._translate, path, "write")
        with translate():
            output = self._folder.open_output(path)
        try:
            yield Stream(output, translate)
            with translate():
                output.commit()
        except BaseException:
            output.abort()
            raise

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write the whole file, replacing one of that name."""
        with self.open_output(path) as stream:
            stream.write(data)

    def create_bytes(self, path: str, data: bytes) -> bool:
        """Write the whole file unless there is one; return whether this call made it (of racing calls, one does)."""
        with self._translate(path, "write"):
            return self._folder.create(path, data)

    def replace_bytes(self, path: str, data: bytes, expected: str | None) -> bool:
        """Write the whole file if it is still the version that `read_versioned` told; return whether it was written.

        Of racing calls that expect the same version, one writes. Plain writes beside them are not held back.

        Args:
            path: The file.
            data: Its new content.
            expected: The version it must have; None if there must be no file.
        """
        if expected is None:
            return self.create_bytes(path, data)
        with self._translate(path, "write"):
            return self._folder.replace(path, data, expected)

    def delete(self, path: str) -> None:
        """Delete the file at `path` if there is one."""
        with self._translate(path, "delete"):
            self._folder.delete(path)

    def delete_folder(self, path: str) -> None:
        """Delete the folder `path` and all files below it."""
        with self._translate(path, "delete"):
            self._folder.delete_folder(path)

    @contextmanager
    def _translate(self, path: str, verb: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise StoreError(f"{self.uri(path)}: cannot {verb} it: there is no such file") from None
        except (OSError, ValueError, BotoCoreError, ClientError) as error:
            kind = StoreUnavailableError if self._folder.may_pass(error) else StoreError
            raise kind(f"{self.uri(path)}: cannot {verb} it: {self._folder.explain(error)}") from error


class Stream:
    """A file of a store whose own errors become the store's; those of the block that uses it stay what they are."""

    def __init__(self, stream: Any, translate: _Translate) -> None:
        self._stream = stream
        self._translate = translate

    def read(self, num_bytes: int | None = None) -> bytes:
        """Return so many bytes, fewer only at the file's end; all that is left without a number."""
        with self._translate():
            return bytes(self._stream.read(-1 if num_bytes is None else num_bytes))

    def seek(self, position: int) -> int:
        """Read on from `position`."""
        with self._translate():
            return int(self._stream.seek(position))

    def tell(self) -> int:
        """Return the position of the next byte."""
        return int(self._stream.tell())

    def write(self, data: bytes) -> None:
        """Append `data`."""
        with self._translate():
            self._stream.write(data)

    def writelines(self, pieces: Iterable[bytes]) -> None:
        """Append each of `pieces`."""
        with self._translate():
            for piece in pieces:
                self._stream.write(piece)
