"""Writing objects: whole, on a condition, and as streams of parts."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import uuid
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from wmtp.exceptions import StorageConflictError, StorageError
from wmtp.storage.s3_client import S3Client
from wmtp.storage.s3_errors import Fault, Retry
from wmtp.storage.s3_streams import split_uri

logger = logging.getLogger(__name__)

# Metadata of an object that tells which call wrote it.
_WRITE_ID = "wmtp-write"
_MAX_PARTS = 10_000  # "Amazon S3 multipart upload limits"
# For what follows a failure, which is to be told of soon.
_CLEAN_UP_DEADLINE_S = 10.0


def put_object(
    client: S3Client,
    uri: str,
    content: bytes | bytearray,
    *,
    if_absent: bool = False,
    if_match: str | None = None,
) -> str:
    """Write an object in one request, whose SHA-256 the server checks; returns its ETag without quotes.

    A condition is checked by the server in the moment it writes. Where a try was written and its answer lost,
    the next one finds the condition broken by its own writing: the object then carries this call's id.

    Raises:
        StorageConflictError: the object is there (`if_absent`), or is not the one of `if_match`.
        StorageError: it cannot be written.
    """
    write_id = uuid.uuid4().hex
    condition: dict[str, str] = {}
    if if_absent:
        condition["IfNoneMatch"] = "*"
    if if_match is not None:
        condition["IfMatch"] = f'"{if_match}"'
    may_be_written = False

    def note(fault: Fault) -> None:
        nonlocal may_be_written
        may_be_written |= fault.retry is Retry.OUTAGE

    def put() -> dict[str, Any]:
        return client.request_once(
            "put_object",
            **split_uri(uri),
            **condition,
            Body=content,
            ChecksumSHA256=_digest(content),
            Metadata={_WRITE_ID: write_id},
        )

    try:
        return etag_of(client.retry(uri, put, on_fault=note))
    except StorageConflictError:
        etag = _find_written(client, uri, write_id) if may_be_written else None
        if etag is None:
            raise
        return etag


class UploadStream(io.RawIOBase):
    """A stream that writes an object; nothing can be seen of it before `commit`.

    Parts of `s3.part_size_mib` are sent as they fill up, each with a SHA-256 that the server checks. At most
    `s3.max_concurrency` parts are held beside the one that is being filled; `write` waits when they are.
    What is smaller than a part is one request.
    """

    def __init__(self, client: S3Client, uri: str) -> None:
        self._client = client
        self._uri = uri
        self._part_bytes = client.settings.part_size_mib * 2**20
        self._part = bytearray()
        self._num_written = 0
        self._upload_id: str | None = None
        self._write_id = uuid.uuid4().hex
        self._threads = ThreadPoolExecutor(client.settings.max_concurrency, thread_name_prefix="s3-write")
        self._in_flight: deque[Future[dict[str, Any]]] = deque()
        self._sent: list[dict[str, Any]] = []

    def writable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._num_written

    def write(self, content: Any) -> int:
        """See `io.RawIOBase`."""
        if self.closed:
            raise ValueError("write to a closed stream")
        view = memoryview(content).cast("B")
        at = 0
        while at < len(view):
            piece = view[at : at + self._part_bytes - len(self._part)]
            self._part += piece
            at += len(piece)
            if len(self._part) == self._part_bytes:
                self._send()
        self._num_written += len(view)
        return len(view)

    def commit(self) -> str:
        """Make the object visible with all that was written; returns its ETag without quotes.

        Raises:
            StorageError: it cannot be written; nothing is visible then, and the upload is ended.
        """
        try:
            if self._upload_id is None:
                return put_object(self._client, self._uri, self._part)
            if self._part:
                self._send()
            while self._in_flight:
                self._sent.append(self._in_flight.popleft().result())
            return self._complete()
        except BaseException:
            self.abort()
            raise
        finally:
            self.close()

    def abort(self) -> None:
        """End the upload without an object; parts that were sent are given up."""
        self._threads.shutdown(cancel_futures=True)
        self.close()
        if self._upload_id is None:
            return
        target = {**split_uri(self._uri), "UploadId": self._upload_id}
        self._upload_id = None
        try:
            self._client.retry(
                self._uri,
                lambda: self._client.request_once("abort_multipart_upload", **target),
                deadline_s=min(_CLEAN_UP_DEADLINE_S, self._client.settings.deadline_s),
            )
        except StorageError as error:
            logger.warning(
                "parts of the given up upload %s to %s stay on the server, unseen, until a clean-up rule of "
                "the bucket removes them: %s",
                target["UploadId"],
                self._uri,
                error.message,
            )

    def close(self) -> None:
        """See `io.RawIOBase`."""
        self._threads.shutdown(wait=False)
        self._part = bytearray()
        super().close()

    def _send(self) -> None:
        """Hand the part over to a thread; wait before, if as many as may be are under way."""
        if self._upload_id is None:
            answer = self._client.request(
                "create_multipart_upload",
                self._uri,
                **split_uri(self._uri),
                ChecksumAlgorithm="SHA256",
                Metadata={_WRITE_ID: self._write_id},
            )
            self._upload_id = str(answer["UploadId"])
        if len(self._in_flight) == self._client.settings.max_concurrency:
            self._sent.append(self._in_flight.popleft().result())
        number = len(self._sent) + len(self._in_flight) + 1
        if number > _MAX_PARTS:
            raise StorageError(
                f"{self._uri} would have more than {_MAX_PARTS} parts of {self._part_bytes} bytes",
                remedy="raise s3.part_size_mib",
            )
        self._in_flight.append(self._threads.submit(self._send_part, number, self._part))
        self._part = bytearray()

    def _send_part(self, number: int, content: bytearray) -> dict[str, Any]:
        digest = _digest(content)
        answer = self._client.request(
            "upload_part",
            self._uri,
            **split_uri(self._uri),
            UploadId=self._upload_id,
            PartNumber=number,
            Body=content,
            ChecksumSHA256=digest,
        )
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": digest}

    def _complete(self) -> str:
        try:
            answer = self._client.request(
                "complete_multipart_upload",
                self._uri,
                **split_uri(self._uri),
                UploadId=self._upload_id,
                MultipartUpload={"Parts": self._sent},
            )
            return etag_of(answer)
        except StorageError:
            # A try may have completed it and its answer been lost: there is no such upload then any more.
            etag = _find_written(self._client, self._uri, self._write_id)
            if etag is None:
                raise
            return etag


def _find_written(client: S3Client, uri: str, write_id: str) -> str | None:
    """The ETag of the object if it is the one that was written with this id."""
    try:
        found = client.retry(
            uri,
            lambda: client.request_once("head_object", **split_uri(uri)),
            deadline_s=min(_CLEAN_UP_DEADLINE_S, client.settings.deadline_s),
        )
    except StorageError:  # the failure that led here is the one to tell of
        return None
    return etag_of(found) if found.get("Metadata", {}).get(_WRITE_ID) == write_id else None


def etag_of(answer: dict[str, Any]) -> str:
    """The ETag in an answer, without its quotes."""
    return str(answer["ETag"]).strip('"')


def _digest(content: bytes | bytearray) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode("ascii")
