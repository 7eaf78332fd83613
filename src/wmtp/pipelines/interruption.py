"""What a signal means at each moment of a training run: what is saved by then, and how to go on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from wmtp.components.trainer.callbacks import RunStopped
from wmtp.exceptions import TrainingInterruptedError, disk_error

logger = logging.getLogger(__name__)

# Shells report 128 + n of a process that signal n ended.
_SHELL_OFFSET = 128


class RunStage:
    """How far a run has come, for what is said when a signal ends it outside the steps.

    Within the steps the loop itself ends, with a save. Before them nothing is worth waiting for, and after
    them everything that took long is saved, so there a signal ends the run at once.
    """

    def __init__(self) -> None:
        self._saved: str | None = None
        self._resume: str | None = None
        self._is_trained = False

    def resumed(self, checkpoint: str, run: str) -> None:
        """The run goes on from `checkpoint`, a step of the run folder `run`; said where that is new."""
        is_new = checkpoint != self._saved
        self._saved, self._resume = checkpoint, run
        if is_new:
            logger.info("going on from %s", checkpoint)

    def trained(self, checkpoint: str, run: str) -> None:
        """Training is over and saved in `checkpoint`; export, evaluation and report are left."""
        self._saved, self._resume, self._is_trained = checkpoint, run, True

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn a signal's exception, or that of a disk, into the error that says what is saved.

        Raises:
            OutputError: a disk is full, read-only or forbidden.
            TrainingInterruptedError: with exit code 4 where there is a checkpoint to go on from, else with
                the code a shell reports of a process that the signal ended.
        """
        try:
            yield
        except RunStopped as stopped:
            raise self._error(stopped) from None
        except OSError as error:
            known = disk_error(error)
            if known is None:
                raise
            if self._saved is not None:
                known.remedy = f"{known.remedy}, then go on with --resume {self._resume}"
            raise known from error

    def _error(self, stopped: RunStopped) -> TrainingInterruptedError:
        name = stopped.number.name
        if self._saved is None:
            error = TrainingInterruptedError(
                f"{name} ended the run before its first step; there is nothing to save yet",
                remedy="start the run again",
            )
            error.exit_code = _SHELL_OFFSET + stopped.number
            return error
        if self._is_trained:
            return TrainingInterruptedError(
                f"{name} ended the run after training, which is saved in {self._saved}; export, evaluation "
                "or report are not finished",
                remedy=f"finish them with --resume {self._resume}",
            )
        return TrainingInterruptedError(
            f"{name} ended the run before its first step; it is where it was, at {self._saved}",
            remedy=f"go on with --resume {self._resume}",
        )
