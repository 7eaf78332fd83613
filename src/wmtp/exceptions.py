"""Errors that say whose fault it is and what to do about it.

Every error a user can cause is a `WmtpError`: one clear message and a remedy. The command line prints both
and leaves with `exit_code`; a traceback is shown only for errors that are not of this family, because those
are bugs.
"""

from __future__ import annotations

import errno

# What a disk answers that is full, read-only, forbidden, gone or broken.
_DISK_ERRORS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EFBIG,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.EIO,
        errno.EMFILE,
    }
)


class WmtpError(Exception):
    """Base of all expected failures.

    Args:
        message: what happened, with the value that caused it.
        remedy: what the user can do about it, one sentence.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}\n  remedy: {self.remedy}"


class UserInputError(WmtpError, ValueError):
    """A setting, argument or file that cannot be used. Also a `ValueError`, for users of the library."""

    exit_code = 2


class DataError(UserInputError):
    """A dataset that is missing, empty or has a row that cannot be read; the message names file and line."""


class ModelLoadError(UserInputError):
    """A model that cannot be loaded; the message names the file and, where known, the tensor."""


class CheckpointError(UserInputError):
    """A training checkpoint that is missing, incomplete or does not fit the run."""


class StorageError(UserInputError):
    """A remote store that cannot be used; the message names the address and what to do."""


class StorageMissingError(StorageError):
    """The store has no such object or bucket."""


class StorageCredentialsError(StorageError):
    """There are no credentials for the store, or they are wrong or have expired."""


class StorageDeniedError(StorageError):
    """The store refuses what was asked with these credentials."""


class StorageConflictError(StorageError):
    """A write on a condition found the object there already, or changed."""


class StorageDamagedError(StorageError):
    """The bytes that arrived are not those that were sent, or not those that were expected."""


class StorageUnavailableError(StorageError):
    """The store was away, failing or busy until the deadline; it may come back."""

    exit_code = 1


class StorageFullError(StorageError):
    """The store has no space left."""

    exit_code = 1


class OutputError(WmtpError):
    """A disk that cannot be written to or read from: full, read-only, not permitted."""


class SandboxUnavailableError(UserInputError):
    """No sandbox works on this machine, so untrusted programs are not run."""


class TrainingDivergedError(WmtpError):
    """Loss or gradient became NaN or infinite and the run was stopped."""

    exit_code = 3


class TrainingInterruptedError(WmtpError):
    """The run was asked to stop by a signal; the state was saved and can be resumed."""

    exit_code = 4


def disk_error(error: OSError) -> OutputError | None:
    """The error of a full, read-only or forbidden disk as one to show; None for an error of another kind."""
    if error.errno not in _DISK_ERRORS:
        return None
    where = "" if error.filename is None else f"{error.filename}: "
    return OutputError(
        f"{where}{error.strerror}", remedy="check the free space, the limits and the permissions there"
    )
