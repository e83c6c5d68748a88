"""A raw dataset's root, a local folder or `s3://bucket/prefix`, read and never written.

Sources ask for hundreds of thousands of files: locally that is one `os.stat` each, remotely one listing of everything.
"""

from __future__ import annotations

import os
import posixpath
import stat
from pathlib import Path

from cvft.errors import DataError
from pipeline.storage import FileStatus, Store


class RawFolder:
    """A folder of raw data; every path is relative to it, with forward slashes (a local one may also be absolute).

    It pickles as its URI, so that workers open their own.
    """

    def __init__(self, uri: str, store: Store | None) -> None:
        self.uri = uri
        self._store = store
        self._prefix = f"{uri.rstrip('/')}/"
        self._files: dict[str, FileStatus] | None = None
        self._children: dict[str, list[str]] | None = None

    @classmethod
    def from_uri(cls, uri: str | Path | RawFolder) -> RawFolder:
        """Open the folder that `uri` names; it need not exist.

        Raises:
            StoreError: It is empty, its scheme is neither `file` nor `s3`, or it names no bucket.
        """
        if isinstance(uri, RawFolder):
            return uri
        store = Store.from_uri(uri)
        return cls(store.uri(), store if store.local_path("") is None else None)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Pickle as the URI."""
        return RawFolder.from_uri, (self.uri,)

    def __repr__(self) -> str:
        """Return the URI, marked as a raw folder."""
        return f"RawFolder({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        """Tell whether both are the same folder."""
        return isinstance(other, RawFolder) and other.uri == self.uri

    def __hash__(self) -> int:
        """Return the hash of the URI."""
        return hash(self.uri)

    def status(self, path: str) -> FileStatus | None:
        """Return size and stamp of the file at `path`, or None if there is no such file (a folder is none).

        Raises:
            DataError: A local folder on the way may not be entered.
            StoreError: The object store cannot be listed.
        """
        if self._store is not None:
            return self._listing(self._store).get(posixpath.normpath(path))
        try:
            found = os.stat(path if path[:1] == "/" else self._prefix + path)
        except PermissionError as error:  # or else a whole dataset would seem to be missing
            raise DataError(f"{self._full(path)}: cannot be read: {error.strerror}") from None
        except (OSError, ValueError):  # a ValueError: the name has a null byte
            return None
        return FileStatus(found.st_size, str(found.st_mtime_ns)) if stat.S_ISREG(found.st_mode) else None

    def has(self, path: str = "") -> bool:
        """Tell whether there is a file or a folder at `path`; without one, whether the root is there."""
        if self._store is not None:
            return path in self._listing(self._store) or path in self._folders(self._store)
        return os.path.exists(self._full(path))

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files and folders directly below `folder`, sorted; none if there is no such folder.

        Raises:
            DataError: It cannot be read.
        """
        if self._store is not None:
            return self._folders(self._store).get(folder, [])
        try:
            return sorted(os.listdir(self._full(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise DataError(f"{self._full(folder)}: cannot be read: {error.strerror}") from None

    def read_bytes(self, path: str) -> bytes:
        """Return a whole file.

        Raises:
            DataError: The local file cannot be read.
            StoreError: The object cannot be read.
        """
        if self._store is not None:
            return self._store.read_bytes(posixpath.normpath(path))
        try:
            return _read_file(self._full(path))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self._full(path)}: cannot be read: {reason}") from None

    def read_text(self, path: str) -> str:
        """Return a list or table as text: a byte-order mark is dropped, other bytes survive as surrogates.

        Raises:
            DataError: The local file cannot be read.
            StoreError: The object cannot be read.
        """
        return self.read_bytes(path).decode("utf-8-sig", errors="surrogateescape")

    def _full(self, path: str) -> str:
        if path.startswith("/"):
            return path
        return self._prefix + path if path else self.uri

    def _listing(self, store: Store) -> dict[str, FileStatus]:
        if self._files is None:
            self._files = store.list_sizes()
        return self._files

    def _folders(self, store: Store) -> dict[str, list[str]]:
        """Return the names below each folder, made once of the listing."""
        if self._children is None:
            children: dict[str, set[str]] = {}
            for path in self._listing(store):
                while path:
                    folder, _, name = path.rpartition("/")
                    siblings = children.setdefault(folder, set())
                    if name in siblings:
                        break
                    siblings.add(name)
                    path = folder
            self._children = {folder: sorted(names) for folder, names in children.items()}
        return self._children


def _read_file(path: str) -> bytes:
    """Read a file in four system calls: `open` with its buffers costs as much as copying a small image."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        num_bytes = os.fstat(descriptor).st_size
        content = os.read(descriptor, num_bytes)
        while len(content) < num_bytes and (rest := os.read(descriptor, num_bytes - len(content))):
            content += rest  # network file systems may give a part
        return content
    finally:
        os.close(descriptor)
