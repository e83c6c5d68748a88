"""A bucket's folder as `pipeline.storage.Store` uses it, by boto3; errors are botocore's, `explain` words them.

Endpoint, region, credentials, profile and addressing style are what the usual AWS variables and configuration files say
(a server of one's own is spoken to in path style unless configured otherwise). There is one client per process.

What a server or a network does wrong is met twice: botocore repeats a request that failed, up to eight times with
growing pauses (AWS_MAX_ATTEMPTS changes that), and a body that breaks half-way is continued by a ranged read of the
same version. A conditional write carries a token, so that one which succeeded while its answer got lost is recognised.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import uuid
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError
from pyarrow import fs

from pipeline import s3_errors
from pipeline.s3_download import Download
from pipeline.s3_upload import TOKEN, Upload, is_written_by

MAX_ATTEMPTS = 8
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
MAX_CONNECTIONS = 32
# Stores such as Ceph know no trailing checksums, which botocore and pyarrow send and expect unless told.
CHECKSUM_VARIABLES = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")

_CLIENT_LOCK = threading.Lock()
_LOGGER = logging.getLogger(__name__)


class S3Folder:
    """Objects whose keys start with a prefix; paths are relative to it."""

    scheme = "s3"

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._bucket, _, self._prefix = self.root.partition("/")

    def status(self, path: str) -> tuple[int, str] | None:
        """Return bytes and a stamp of the object (its ETag), or None if there is none."""
        # Not HEAD, whose answer does not say whether it is the object or the bucket that is missing.
        target = self._object(path)
        answer = client().list_objects_v2(Bucket=target["Bucket"], Prefix=target["Key"], MaxKeys=1)
        for found in answer.get("Contents", ()):  # a key sorts before all that begin with it
            if found["Key"] == target["Key"]:
                return int(found["Size"]), str(found["ETag"])
        return None

    def list(self, prefix: str) -> dict[str, tuple[int, str]]:
        """Return `status` of every object below the folder `prefix`."""
        start = f"{self._prefix}/" if self._prefix else ""
        folder = f"{start}{prefix.rstrip('/')}/" if prefix else start
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=folder)
        return {
            found["Key"][len(start) :]: (int(found["Size"]), str(found["ETag"]))
            for page in pages
            for found in page.get("Contents", ())
            if not found["Key"].endswith("/")  # an empty object by which some tools show a folder
        }

    def open_input(self, path: str) -> Download:
        """Open the object for reading."""
        return self._download(path)

    def read_range(self, path: str, start: int, num_bytes: int) -> bytes:
        """Return at most `num_bytes` from `start` on; fewer where the object ends."""
        try:
            return self._download(path, start=start, stop=start + num_bytes).read()
        except ClientError as error:
            if error.response["Error"]["Code"] == "InvalidRange":
                return b""
            raise

    def read_versioned(self, path: str) -> tuple[bytes, str] | None:
        """Return the content and its ETag, or None if there is no object."""
        try:
            source = self._download(path)
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise
        return source.read(), str(source.etag).strip('"')

    def open_output(self, path: str) -> Upload:
        """Begin an object that appears when it is committed."""
        target = self._object(path)
        return Upload(client(), bucket=target["Bucket"], key=target["Key"])

    def create(self, path: str, data: bytes) -> bool:
        """Write the object unless there is one; return whether this call made it."""
        return self._put_if(path, data, IfNoneMatch="*")

    def replace(self, path: str, data: bytes, version: str) -> bool:
        """Write the object if it still has this ETag; return whether it was written."""
        # Without its quotation marks: Ceph 16 compares them, AWS takes both.
        return self._put_if(path, data, IfMatch=version)

    def delete(self, path: str) -> None:
        """Delete the object if there is one."""
        client().delete_object(**self._object(path))

    def delete_folder(self, path: str) -> None:
        """Delete all objects below the folder."""
        for name in self.list(path):
            self.delete(name)

    def arrow(self) -> Any:
        """Return the server as a pyarrow file system."""
        meta = client().meta
        if ".amazonaws.com" in meta.endpoint_url:
            return fs.S3FileSystem(region=meta.region_name)
        return fs.S3FileSystem(endpoint_override=meta.endpoint_url, region=meta.region_name)

    def explain(self, error: Exception) -> str:
        """Say in one line what is wrong and what to do."""
        return s3_errors.explain(error, bucket=self._bucket)

    def may_pass(self, error: Exception) -> bool:
        """Tell whether the same request may succeed later without anybody mending anything."""
        return s3_errors.may_pass(error)

    def _object(self, path: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": "/".join(part for part in (self._prefix, path) if part)}

    def _download(self, path: str, *, start: int = 0, stop: int | None = None) -> Download:
        target = self._object(path)
        return Download(client(), bucket=target["Bucket"], key=target["Key"], start=start, stop=stop)

    def _put_if(self, path: str, data: bytes, **condition: str) -> bool:
        target = self._object(path)
        token = uuid.uuid4().hex
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                client().put_object(**target, Body=data, Metadata={TOKEN: token}, **condition)
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == 409 and attempt < MAX_ATTEMPTS:  # AWS: another write of this key is under way
                    time.sleep(0.1 * attempt)
                    continue
                if status == 404 and "IfMatch" in condition and error.response["Error"]["Code"] != "NoSuchBucket":
                    return False
                if status != 412:  # the condition does not hold
                    raise
                return is_written_by(client(), token, **target)
            else:
                return True
        raise AssertionError  # the last attempt returns or raises


def client() -> Any:
    """Return this process's client for what the AWS variables say now.

    Raises:
        botocore.exceptions.BotoCoreError: The profile or another setting is unknown.
        ValueError: The endpoint is no URL.
    """
    for name in CHECKSUM_VARIABLES:
        os.environ.setdefault(name, "when_required")
    settings = frozenset((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    with _CLIENT_LOCK:  # a session is no thread's to share while it makes a client
        return _client(os.getpid(), settings)


@functools.lru_cache(maxsize=8)
def _client(_process: int, settings: frozenset[tuple[str, str]]) -> Any:
    variables = dict(settings)
    session = boto3.session.Session()
    retries: dict[str, Any] = {"mode": "standard"}
    if "AWS_MAX_ATTEMPTS" not in variables:
        retries["total_max_attempts"] = MAX_ATTEMPTS
    config = Config(
        retries=retries,
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=MAX_CONNECTIONS,
        tcp_keepalive=True,
    )
    # boto3 itself knows AWS_DEFAULT_REGION alone. Stores of one's own have no regions, but a signature needs some name.
    region = variables.get("AWS_REGION") or session.region_name or "us-east-1"
    made = session.client("s3", region_name=region, config=config)
    made.meta.events.register("needs-retry.s3", _tell_failure)
    return made


def _tell_failure(*, attempts: int, operation: Any, response: Any, caught_exception: Any, **_: Any) -> None:
    """Log from the second failure of a request on: a job that waits for its server should not be silent."""
    if attempts < 2:
        return
    if caught_exception is not None:
        _LOGGER.warning("S3 %s failed %d times: %s", operation.name, attempts, caught_exception)
    elif response is not None and response[0].status_code >= 500:
        _LOGGER.warning("S3 %s failed %d times: HTTP %d", operation.name, attempts, response[0].status_code)
