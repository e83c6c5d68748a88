"""Reading an object: a body that breaks half-way is continued where it broke, from the same version of the object."""

from __future__ import annotations

import logging
import random
import time
from typing import Any

from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

MAX_ATTEMPTS = 8  # in a row without a single byte
LONGEST_PAUSE_S = 8.0
CHUNK_BYTES = 1 << 20

_BROKEN = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
_LOGGER = logging.getLogger(__name__)


class Download:
    """The bytes of an object from a position on, with `read`, `seek`, `tell` and `close`."""

    def __init__(self, client: Any, *, bucket: str, key: str, start: int = 0, stop: int | None = None) -> None:
        self._client = client
        self._object = {"Bucket": bucket, "Key": key}
        self._position = start
        self._stop = stop
        self.etag: str | None = None
        self._body: Any = None
        self._open()

    def read(self, num_bytes: int | None = -1) -> bytes:
        """Return so many bytes, fewer only at the object's end; all that is left without a number."""
        wanted = max(0, self._end - self._position)
        if num_bytes is not None and num_bytes >= 0:
            wanted = min(wanted, num_bytes)
        chunks = []
        while wanted:
            chunks.append(self._next(min(wanted, CHUNK_BYTES)))
            wanted -= len(chunks[-1])
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def seek(self, position: int) -> int:
        """Read on from `position`."""
        if position != self._position:
            self.close()
            self._position = position
        return position

    def tell(self) -> int:
        """Return the position of the next byte."""
        return self._position

    def close(self) -> None:
        """Give the connection back."""
        if self._body is not None:
            self._body.close()
            self._body = None

    def _next(self, num_bytes: int) -> bytes:
        for attempt in range(MAX_ATTEMPTS):
            try:
                if self._body is None:
                    self._open()
                chunk: bytes = self._body.read(num_bytes)
                if not chunk:
                    raise IncompleteReadError(actual_bytes=self._position, expected_bytes=self._end)
            except _BROKEN as error:
                self.close()
                if attempt == MAX_ATTEMPTS - 1:
                    raise
                _LOGGER.warning("s3://%(Bucket)s/%(Key)s: the connection broke; reading on", self._object)
                _LOGGER.debug("broken at byte %d: %s", self._position, error)
                if attempt:
                    time.sleep(random.uniform(0, min(LONGEST_PAUSE_S, 2**attempt)))
            else:
                self._position += len(chunk)
                return chunk
        raise AssertionError  # the last attempt returns or raises

    def _open(self) -> None:
        options = {} if self.etag is None else {"IfMatch": self.etag}
        if self._position or self._stop is not None:
            last = "" if self._stop is None else self._stop - 1
            options["Range"] = f"bytes={self._position}-{last}"
        response = self._client.get_object(**self._object, **options)
        self.etag = response["ETag"]
        self._end = self._position + int(response["ContentLength"])
        self._body = response["Body"]
