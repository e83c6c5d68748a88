"""One small interface over local folders and object stores: `runs/shards`, `file:///data/shards`, `s3://bucket/prefix`.

An object store is a matter of configuration: endpoint, region and credentials come from the usual AWS variables
(AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_PROFILE, ...). A `Store` is named by its URI, so a worker on
another node opens its own from the same string.

What is promised: a file written here appears whole under its name or not at all (locally a temporary file, fsync and a
rename; in an object store the object's own rule), and a create-only write has exactly one winner.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import boto3
import botocore.exceptions
from pyarrow import fs

from cvft.errors import StoreError

# Without these, pyarrow's writes are refused by stores that know no trailing checksums (Ceph answers HTTP 411).
CHECKSUM_VARIABLES = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")

_Translate = Callable[[], AbstractContextManager[None]]


class Store:
    """A folder, local or remote; every path given to its methods is relative to it and uses forward slashes."""

    def __init__(self, *, filesystem: Any, root: str, scheme: str) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._scheme = scheme

    @classmethod
    def from_uri(cls, uri: str | Path) -> Store:
        """Open the store that `uri` names; a local folder need not exist yet.

        Raises:
            StoreError: The scheme is neither `file` nor `s3`, or the bucket is missing in the URI.
        """
        text = str(uri)
        scheme, separator, rest = text.partition("://")
        if not separator:
            return cls(filesystem=fs.LocalFileSystem(), root=str(Path(text).expanduser().absolute()), scheme="file")
        if scheme == "file":
            return cls(filesystem=fs.LocalFileSystem(), root=str(Path(unquote(rest)).absolute()), scheme="file")
        if scheme == "s3":
            if not rest.strip("/"):
                raise StoreError(f"{text}: names no bucket; write s3://bucket/prefix")
            return cls(filesystem=_s3_filesystem(), root=rest, scheme="s3")
        raise StoreError(f"{text}: unknown scheme {scheme!r}; use a local path, file:// or s3://")

    def uri(self, path: str = "") -> str:
        """Return the full name of `path`: an absolute path if local, else a URI."""
        full = self._full(path)
        return full if self._scheme == "file" else f"{self._scheme}://{full}"

    @property
    def arrow(self) -> tuple[Any, str]:
        """The pyarrow file system and the path within it, for libraries that write there themselves."""
        return self._filesystem, self._root

    def local_path(self, path: str) -> Path | None:
        """Return `path` as a file on this machine, or None in an object store."""
        return Path(self._full(path)) if self._scheme == "file" else None

    def exists(self, path: str) -> bool:
        """Tell whether there is a file at `path`."""
        return bool(self._info(path).is_file)

    def size(self, path: str) -> int | None:
        """Return the bytes of the file at `path`, or None if there is none."""
        info = self._info(path)
        return int(info.size) if info.is_file else None

    def list(self, prefix: str = "") -> list[str]:
        """Return all files below the folder `prefix`, sorted; none if there is no such folder."""
        selector = fs.FileSelector(self._full(prefix), recursive=True, allow_not_found=True)
        with self._translate(prefix, "list"):
            infos = self._filesystem.get_file_info(selector)
        start = len(self._root) + 1
        return sorted(info.path[start:] for info in infos if info.is_file)

    def read_bytes(self, path: str) -> bytes:
        """Return the whole file."""
        with self._translate(path, "read"), self._filesystem.open_input_stream(self._full(path)) as stream:
            return bytes(stream.read())

    @contextmanager
    def open_input(self, path: str) -> Iterator[Any]:
        """Open a file for reading: `read(n)`, `seek(position)`."""
        translate = partial(self._translate, path, "read")
        with translate():
            stream = self._filesystem.open_input_file(self._full(path))
        with stream:
            yield _Stream(stream, translate)

    @contextmanager
    def open_output(self, path: str) -> Iterator[Any]:
        """Open a file for writing (`write(data)`); it appears under its name when the block ends without an error."""
        translate = partial(self._translate, path, "write")
        if self._scheme == "file":
            with _atomic_file(Path(self._full(path)), translate) as stream:
                yield stream
            return
        with translate():
            stream = self._filesystem.open_output_stream(self._full(path))
        try:
            yield _Stream(stream, translate)
        except BaseException:
            # An S3 stream publishes what it holds when it is closed: take the torso away again.
            with translate():
                stream.close()
                self._filesystem.delete_file(self._full(path))
            raise
        with translate():
            stream.close()

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write the whole file, replacing one of that name."""
        with self.open_output(path) as stream:
            stream.write(data)

    def delete(self, path: str) -> None:
        """Delete the file at `path` if there is one."""
        with self._translate(path, "delete"):
            if self._info(path).is_file:
                self._filesystem.delete_file(self._full(path))

    def delete_folder(self, path: str) -> None:
        """Delete the folder `path` and all files below it."""
        with self._translate(path, "delete"):
            self._filesystem.delete_dir(self._full(path))

    def create_bytes(self, path: str, data: bytes) -> bool:
        """Write the whole file unless there is one; return whether this call made it (of racing calls, one does)."""
        with self._translate(path, "write"):
            return self._create_local(path, data) if self._scheme == "file" else self._create_s3(path, data)

    def _create_local(self, path: str, data: bytes) -> bool:
        target = Path(self._full(path))
        temporary = _temporary_beside(target)
        try:
            _write_synced(temporary, data)
            os.link(temporary, target)  # unlike a rename, a link refuses an existing name
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _create_s3(self, path: str, data: bytes) -> bool:
        bucket, _, key = self._full(path).partition("/")
        try:
            # pyarrow knows no conditional write.
            boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except botocore.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 412:  # precondition failed: it exists
                return False
            raise
        return True

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _info(self, path: str) -> Any:
        with self._translate(path, "look at"):
            return self._filesystem.get_file_info(self._full(path))

    @contextmanager
    def _translate(self, path: str, verb: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise StoreError(f"{self.uri(path)}: cannot {verb} it, there is no such file or bucket") from None
        except (OSError, botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            reason = " ".join(str(error).split())
            raise StoreError(f"{self.uri(path)}: cannot {verb} it: {reason}") from error


class _Stream:
    """A file of a store whose own errors become the store's; those of the block that uses it stay what they are."""

    def __init__(self, stream: Any, translate: _Translate) -> None:
        self._stream = stream
        self._translate = translate

    def read(self, num_bytes: int | None = None) -> bytes:
        with self._translate():
            return bytes(self._stream.read(num_bytes))

    def seek(self, position: int) -> None:
        with self._translate():
            self._stream.seek(position)

    def write(self, data: bytes) -> None:
        with self._translate():
            self._stream.write(data)


def _s3_filesystem() -> Any:
    for name in CHECKSUM_VARIABLES:
        os.environ.setdefault(name, "when_required")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint is None:
        return fs.S3FileSystem(region=region)
    # Stores of one's own have no regions, but the request's signature needs some name.
    return fs.S3FileSystem(endpoint_override=endpoint, region=region or "us-east-1")


def _temporary_beside(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _atomic_file(target: Path, translate: _Translate) -> Iterator[_Stream]:
    with translate():
        temporary = _temporary_beside(target)
        stream = temporary.open("wb")
    try:
        yield _Stream(stream, translate)
        with translate():
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(target)
    finally:
        with translate():
            temporary.unlink(missing_ok=True)
            stream.close()
