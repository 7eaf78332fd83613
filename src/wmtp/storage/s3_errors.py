"""What the S3 libraries raise, told as one error with a remedy, and whether another try can help.

Codes are those of "Error responses" in the Amazon S3 API reference; other servers use the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from wmtp.exceptions import (
    StorageConflictError,
    StorageCredentialsError,
    StorageDamagedError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    StorageMissingError,
    StorageUnavailableError,
)

_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired")
_WRONG_KEY = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidClientTokenId")
_WRONG_REGION = (
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "TemporaryRedirect",
    "IncorrectEndpoint",
)
# botocore writes well-formed XML: what is malformed was changed on the way.
_DAMAGED_ON_THE_WAY = (
    "BadDigest",
    "InvalidDigest",
    "XAmzContentSHA256Mismatch",
    "IncompleteBody",
    "MalformedXML",
)
_FULL = ("InsufficientStorage", "XMinioStorageFull", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded")
_BUSY = ("SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestLimitExceeded")
_CHECK_NETWORK = (
    "check s3.endpoint_url, the network, and the server (its log, its free space), then try again"
)


class Retry(Enum):
    """Whether another try can help.

    NO: the answer would be the same. OUTAGE: the server is away, failing or busy, which passes.
    DAMAGE: what arrived was not what was sent, which passes unless the object itself is damaged.
    """

    NO = "no"
    OUTAGE = "outage"
    DAMAGE = "damage"


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong with one request.

    Attributes:
        error: to raise when there is no further try.
        retry: whether another try can help.
        was_answered: the server gave an answer, so its address is right.
    """

    error: StorageError
    retry: Retry
    was_answered: bool


def fault_types() -> tuple[type[Exception], ...]:
    """What a request to S3 can raise and `explain` tells of."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return (BotoCoreError, ClientError, ResponseParserError, HTTPError, OSError, StorageError)


def explain(error: Exception, uri: str, where: str) -> Fault:
    """Tell what `error`, raised by a request for `uri` to the server `where`, means."""
    from botocore import exceptions as botocore_errors
    from botocore.parsers import ResponseParserError

    no_credentials = (
        botocore_errors.NoCredentialsError,
        botocore_errors.PartialCredentialsError,
        botocore_errors.CredentialRetrievalError,
        botocore_errors.NoAuthTokenError,
    )
    expired = (botocore_errors.SSOError, botocore_errors.TokenRetrievalError)
    if isinstance(error, StorageError):
        retry = Retry.DAMAGE if isinstance(error, StorageDamagedError) else Retry.NO
        return Fault(error, retry, was_answered=True)
    if isinstance(error, botocore_errors.ClientError):
        return _explain_answer(error.response, uri, where)
    if isinstance(error, no_credentials):
        return _final(
            StorageCredentialsError(
                f"{uri} cannot be reached: there are no credentials for {where}",
                remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or s3.access_key_id and "
                "s3.secret_access_key",
            )
        )
    if isinstance(error, expired):
        return _final(_expired(uri, where))
    if isinstance(error, botocore_errors.SSLError):
        return _final(
            StorageUnavailableError(
                f"{uri} cannot be reached: no secure connection to {where}: {error}",
                remedy="check s3.endpoint_url (http or https) and the certificate of the server",
            )
        )
    damaged = (
        botocore_errors.FlexibleChecksumError,
        botocore_errors.ChecksumError,
        botocore_errors.MD5UnavailableError,
    )
    if isinstance(error, damaged):
        return Fault(_damaged(uri, where, "its content does not match its checksum"), Retry.DAMAGE, True)
    cut = (botocore_errors.IncompleteReadError, botocore_errors.ResponseStreamingError, ResponseParserError)
    if isinstance(error, cut):
        return Fault(_unavailable(uri, where, f"its answer was cut off ({error})"), Retry.OUTAGE, True)
    if isinstance(error, (botocore_errors.ParamValidationError, botocore_errors.InvalidRegionError)):
        return _final(
            StorageError(
                f"{uri} is no address of an object: {_one_line(error)}",
                remedy="give s3://bucket/key, and check s3.bucket and s3.region",
            )
        )
    # What is left are connections that were refused, reset, or silent for too long.
    return Fault(_unavailable(uri, where, _one_line(error)), Retry.OUTAGE, False)


def _explain_answer(response: Any, uri: str, where: str) -> Fault:
    """Tell what an error answer of the server means."""
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(response.get("Error", {}).get("Code", status))
    said = f"{code}: {response.get('Error', {}).get('Message', '')}".rstrip(": ")
    if code in _EXPIRED:
        return _final(_expired(uri, where))
    if code in _WRONG_KEY:
        return _final(
            StorageCredentialsError(
                f"{uri}: {where} refuses access with these credentials ({said})",
                remedy="check the access key and its secret (s3.access_key_id and s3.secret_access_key, or "
                "the environment)",
            )
        )
    if code == "RequestTimeTooSkewed":
        return _final(
            StorageCredentialsError(
                f"{uri}: {where} refuses access ({said})", remedy="set the clock of this machine"
            )
        )
    if code in _DAMAGED_ON_THE_WAY:
        return Fault(
            _damaged(uri, where, f"the server received other bytes than were sent ({said})"),
            Retry.DAMAGE,
            True,
        )
    if code in _FULL or status == 507:
        return _final(
            StorageFullError(
                f"{uri} cannot be written: {where} has no space left ({said})",
                remedy="free space there, or write to another bucket",
            )
        )
    if code in _BUSY or status == 429 or status >= 500:
        return Fault(_unavailable(uri, where, f"it answers {status} {said}"), Retry.OUTAGE, True)
    if code in _WRONG_REGION:
        return _final(
            StorageError(
                f"{uri} is not in the region of {where} ({said})",
                remedy="set s3.region to the region of the bucket",
            )
        )
    return _final(_refusal(status, code, said, uri, where))


def _refusal(status: int, code: str, said: str, uri: str, where: str) -> StorageError:
    bucket = uri.removeprefix("s3://").partition("/")[0]
    if code == "NoSuchBucket":
        return StorageMissingError(
            f"{uri} does not exist: {where} has no bucket {bucket!r}",
            remedy="create the bucket, or check its name, s3.endpoint_url and s3.region",
        )
    if code == "NoSuchUpload":
        return StorageError(
            f"{uri}: the upload was ended at {where} before it was complete",
            remedy="another program or a clean-up rule ends uploads in this bucket; write again",
        )
    if status == 404:
        return StorageMissingError(f"{uri} does not exist", remedy="check bucket and key")
    if status in (401, 403):
        return StorageDeniedError(
            f"{uri}: {where} refuses access ({said})",
            remedy="check the access key, its secret, and what it may read and write; where it may not list "
            "a bucket, missing objects look like this too",
        )
    if status in (409, 412):
        return StorageConflictError(
            f"{uri}: another writer was there first ({said})", remedy="read it again, then decide"
        )
    return StorageError(f"{uri}: {where} refuses the request: {status} {said}", remedy="check bucket and key")


def _final(error: StorageError) -> Fault:
    return Fault(error, Retry.NO, was_answered=True)


def _expired(uri: str, where: str) -> StorageError:
    return StorageCredentialsError(
        f"{uri} cannot be reached: the temporary credentials for {where} have expired",
        remedy="get new ones and set AWS_SESSION_TOKEN or s3.session_token with their keys",
    )


def _damaged(uri: str, where: str, problem: str) -> StorageError:
    return StorageDamagedError(
        f"{uri}: {problem}, with the server {where}",
        remedy="try again; if it stays so, write the object anew",
    )


def _unavailable(uri: str, where: str, problem: str) -> StorageError:
    return StorageUnavailableError(f"{uri} cannot be reached at {where}: {problem}", remedy=_CHECK_NETWORK)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
