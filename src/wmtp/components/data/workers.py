"""Processes that prepare data beside the training process: how they end, what is said when one is killed."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from wmtp.exceptions import WmtpError

# How long a worker outlives a SIGTERM: enough for the training process to finish its step.
_GRACE_S = 120


def outlive_sigterm(worker_id: int) -> None:
    """The `worker_init_fn` of every data loader: a SIGTERM ends a worker later, not in the middle of a step.

    A SIGTERM to a whole job reaches its workers too. If they died of it, the training process could not
    finish its step and save. They end when the loader is closed, which it is before the save, or after two
    minutes.
    """
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    # SIGALRM's default ends the process.
    signal.alarm(_GRACE_S)


@contextlib.contextmanager
def explained_worker_deaths() -> Iterator[None]:
    """Turn torch's error about a killed data worker into one that says what to do.

    torch raises it from a signal handler, so anywhere in the loop.

    Raises:
        WmtpError: a worker process of a data loader has died.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if not reason.startswith("DataLoader worker (pid"):
            raise
        raise WmtpError(
            f"a process that prepares training data has died: {reason}",
            remedy="most often memory ran out: lower data.train.num_workers (0 prepares data in the training "
            "process) or give the job more memory, then go on from the last checkpoint with --resume",
        ) from error
