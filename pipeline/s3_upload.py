"""Writing an object: a small one in one request, a large one in parts that are sent while the next ones are written.

At most `NUM_SENDING` full parts are on their way while one more is filled, so a writer holds no more than
(NUM_SENDING + 1) x PART_BYTES = 64 MiB, however large the object. Nothing is seen of the object before it is whole.
"""

from __future__ import annotations

import logging
import uuid
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

PART_BYTES = 16 << 20  # of at most 10,000 parts: 156 GiB
NUM_SENDING = 3
# Metadata that tells whose write an object is, for answers that get lost.
TOKEN = "cvft-write"

_LOGGER = logging.getLogger(__name__)


class Upload:
    """An object that appears when it is committed."""

    def __init__(self, client: Any, *, bucket: str, key: str) -> None:
        self._client = client
        self._object = {"Bucket": bucket, "Key": key}
        self._buffer = bytearray()
        self._token = uuid.uuid4().hex
        self._upload: dict[str, str] | None = None  # of a large object: bucket, key and id
        self._pool = ThreadPoolExecutor(NUM_SENDING)  # starts its threads with the first part
        self._sending: set[Future[None]] = set()
        self._etags: dict[int, str] = {}
        self._num_parts = 0

    def write(self, data: bytes) -> None:
        """Append; waits while enough parts are on their way."""
        rest = memoryview(data).cast("B")
        while len(rest):
            if len(self._buffer) == PART_BYTES:
                self._send()
            room = PART_BYTES - len(self._buffer)
            self._buffer += rest[:room]
            rest = rest[room:]

    def commit(self) -> None:
        """Make the object appear."""
        if self._upload is None:
            self._client.put_object(**self._object, Body=self._buffer)
            return
        self._send()
        while self._sending:
            self._collect()
        self._pool.shutdown()
        self._complete(self._upload)

    def abort(self) -> None:
        """Leave nothing on the server."""
        self._pool.shutdown(cancel_futures=True)  # waits: a part that arrives after the end would stay
        if self._upload is not None:
            try:
                self._client.abort_multipart_upload(**self._upload)
            except (BotoCoreError, ClientError) as error:
                _LOGGER.warning("%s: parts of it may be left in the bucket: %s", self._upload, error)

    def _send(self) -> None:
        if self._upload is None:
            answer = self._client.create_multipart_upload(**self._object, Metadata={TOKEN: self._token})
            self._upload = self._object | {"UploadId": answer["UploadId"]}
        while len(self._sending) >= NUM_SENDING:
            self._collect()
        self._num_parts += 1
        self._sending.add(self._pool.submit(self._send_part, self._upload, self._num_parts, self._buffer))
        self._buffer = bytearray()

    def _send_part(self, upload: dict[str, str], number: int, data: bytearray) -> None:
        self._etags[number] = self._client.upload_part(**upload, PartNumber=number, Body=data)["ETag"]

    def _collect(self) -> None:
        done, self._sending = wait(self._sending, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()

    def _complete(self, upload: dict[str, str]) -> None:
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(self._etags.items())]
        try:
            self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except ClientError as error:
            # Repeated after its answer was lost, the request finds no such upload any more.
            if error.response["Error"]["Code"] != "NoSuchUpload" or not is_written_by(
                self._client, self._token, **self._object
            ):
                raise


def is_written_by(client: Any, token: str, **target: str) -> bool:
    """Tell whether the object of this `Bucket` and `Key` is there and was written with this token."""
    try:
        metadata = client.head_object(**target)["Metadata"]
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return False
        raise
    return bool(metadata.get(TOKEN) == token)
