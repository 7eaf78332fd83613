"""Requests to S3 with tries: botocore's client without its own retries, and one policy for all requests.

botocore, AWS's own library, is used directly and not through s3fs: its client is safe to share by threads,
and its response bodies can be read into memory that is already there, which asynchronous bodies cannot.

One operation is one request with all its tries (a part, a page of a listing, an object). It fails at once
where the answer would be the same again. It is tried until `s3.deadline_s` has passed where the server is
away, failing or busy, and `s3.max_attempts` times where the server has never answered (its address may be
wrong) or where the content arrives damaged (it may be damaged there). Tries wait exponentially longer, with
jitter. A try that has begun is not broken off at the deadline but ends by its own timeouts, a quarter of
`deadline_s` and 60 s at most.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from wmtp.exceptions import StorageError
from wmtp.settings.config import S3Settings
from wmtp.storage.s3_errors import Fault, Retry, explain, fault_types

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 60.0
_FIRST_DELAY_S = 0.2
_LONGEST_DELAY_S = 5.0

ResultT = TypeVar("ResultT")


class S3Client:
    """Requests to one server with the settings of a config; can be shared by threads, pickled, and forked."""

    def __init__(self, settings: S3Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._client: Any = None
        self._process: int | None = None
        self._was_reached = False
        _require_botocore()

    def __reduce__(self) -> tuple[type[S3Client], tuple[S3Settings]]:
        return S3Client, (self.settings,)

    @property
    def where(self) -> str:
        """Address of the server, for messages."""
        return str(self.connected().meta.endpoint_url)

    def request(self, operation: str, uri: str, **arguments: Any) -> dict[str, Any]:
        """Make a request that is the same however often it is made.

        Args:
            operation: a method of botocore's S3 client, such as `put_object`.
            uri: the object, for messages.
            arguments: of the method.

        Raises:
            StorageError: of the kind that fits the answer.
        """
        return self.retry(uri, lambda: self.request_once(operation, **arguments))

    def request_once(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Make one try of a request; raises what botocore raises, for an `action` of `retry`."""
        result: dict[str, Any] = getattr(self.connected(), operation)(**arguments)
        return result

    def retry(
        self,
        uri: str,
        action: Callable[[], ResultT],
        *,
        deadline_s: float | None = None,
        on_fault: Callable[[Fault], None] = lambda fault: None,
    ) -> ResultT:
        """Run `action` until it succeeds, as the head of this module says.

        Args:
            uri: the object, for messages.
            action: makes the request; may keep what it has got so far.
            deadline_s: in place of `s3.deadline_s`.
            on_fault: told of each failure; may raise.

        Raises:
            StorageError: of the kind of the last failure.
        """
        where = self.where  # connects, which takes a while the first time
        limit_s = self.settings.deadline_s if deadline_s is None else deadline_s
        begin = time.monotonic()
        num_tries = 0
        while True:
            num_tries += 1
            try:
                result = action()
            except fault_types() as error:
                fault = explain(error, uri, where)
                on_fault(fault)
                self._was_reached |= fault.was_answered
                spent_s = time.monotonic() - begin
                if not self._may_try_again(fault, num_tries, spent_s, limit_s):
                    raise _after(fault.error, num_tries, spent_s) from error
            else:
                self._was_reached = True
                return result
            delay_s = random.uniform(0.5, 1.0) * min(
                _FIRST_DELAY_S * 2.0 ** min(num_tries, 16), _LONGEST_DELAY_S
            )
            if num_tries == 2:  # one failure is no news
                logger.warning("%s; trying again for up to %.0f s", fault.error.message, limit_s - spent_s)
            time.sleep(min(delay_s, max(0.0, limit_s - spent_s)))

    def _may_try_again(self, fault: Fault, num_tries: int, spent_s: float, limit_s: float) -> bool:
        if fault.retry is Retry.NO or spent_s >= limit_s:
            return False
        is_counted = fault.retry is Retry.DAMAGE or not self._was_reached
        return num_tries < self.settings.max_attempts or not is_counted

    def connected(self) -> Any:
        """botocore's client; made anew in a forked process, which must not share its parent's connections."""
        with self._lock:
            if self._process != os.getpid():
                self._client = _connect(self.settings)
                self._process = os.getpid()
            return self._client


def _connect(settings: S3Settings) -> Any:
    from botocore.config import Config
    from botocore.session import Session

    def plain(secret: Any) -> str | None:
        return None if secret is None else str(secret.get_secret_value())

    try:
        return Session().create_client(
            "s3",
            region_name=settings.region,
            endpoint_url=settings.endpoint_url,
            aws_access_key_id=plain(settings.access_key_id),
            aws_secret_access_key=plain(settings.secret_access_key),
            aws_session_token=plain(settings.session_token),
            config=Config(
                retries={"total_max_attempts": 1},
                connect_timeout=min(_CONNECT_TIMEOUT_S, settings.deadline_s / 4),
                read_timeout=min(_READ_TIMEOUT_S, settings.deadline_s / 4),
                max_pool_connections=settings.max_concurrency + 2,
                # Digests are given where this package wants them; botocore's own guess is a CRC-32.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
    except ValueError as error:
        raise StorageError(
            f"{settings.endpoint_url or settings.region} is no S3 server: {error}",
            remedy="check s3.endpoint_url and s3.region",
        ) from error


def _require_botocore() -> None:
    try:
        import botocore  # noqa: F401
    except ImportError as error:
        raise StorageError(
            "s3:// paths need the package botocore, which is not installed", remedy='pip install "wmtp[s3]"'
        ) from error


def _after(error: StorageError, num_tries: int, spent_s: float) -> StorageError:
    """The error with how often and for how long it was tried."""
    if num_tries == 1:
        return error
    return type(error)(f"{error.message} (after {num_tries} tries in {spent_s:.1f} s)", remedy=error.remedy)
