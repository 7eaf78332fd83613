"""Stops, or goes on within a bound, when loss or gradient is not finite."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp.components.trainer.agreement import rank
from wmtp.components.trainer.callbacks.base import Callback
from wmtp.components.trainer.callbacks.finite_report import BadStep, describe_in_words, describe_step
from wmtp.components.trainer.evidence import HostCopy
from wmtp.distributed.publishing import write_json_atomic
from wmtp.exceptions import TrainingDivergedError
from wmtp.settings.recipe_train import TrainSettings
from wmtp.tracking import Tracker

if TYPE_CHECKING:
    from wmtp.components.trainer.base import TrainingRun
    from wmtp.components.trainer.step import StepResult

logger = logging.getLogger(__name__)

REPORT_NAME = "nonfinite.json"


class FiniteCallback(Callback):
    """Reads the finite flag of a step at the end of the next one, so that the device need not be waited for.

    The update of such a step was already suppressed on the device: parameters and moments are as before it.
    What is known of the step goes to `nonfinite.json`: the steps in a row that were not finite, the newest
    last.

    Args:
        train: says whether to stop, or after how many such steps in a row.
        report_dir: folder of `nonfinite.json`; each further rank writes a file of its own.
        tracker: is given the report when the run stops.
    """

    def __init__(self, train: TrainSettings, report_dir: Path, tracker: Tracker) -> None:
        self.train = train
        self.report_file = report_dir / (f"nonfinite.rank-{rank()}.json" if rank() else REPORT_NAME)
        self.tracker = tracker
        self.num_in_a_row = 0
        self.num_skipped = 0
        self._reports: list[dict[str, Any]] = []
        self._pending: tuple[HostCopy, BadStep] | None = None
        self._run: TrainingRun | None = None

    def on_train_start(self, run: TrainingRun) -> None:
        """Take hold of the run."""
        self._run = run

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        """Look at the step before this one."""
        self._look()
        assert run.is_nonfinite is not None
        assert run.update is not None
        first = (run.step - 1) * run.micro_batches_per_step
        step = BadStep(run.step, first, result.loss, result.evidence, run.update)
        self._pending = (HostCopy(run.is_nonfinite), step)

    def on_train_end(self, run: TrainingRun) -> None:
        """Look at the last step."""
        self._look()

    def state_dict(self) -> dict[str, Any]:
        """The counts, with the last step's in them.

        Raises:
            TrainingDivergedError: the last step ends the run. It is not saved: a resumed run would go on as
                if it had not been.
        """
        self._look()
        return {"num_in_a_row": self.num_in_a_row, "num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.num_in_a_row = int(state["num_in_a_row"])
        self.num_skipped = int(state["num_skipped"])

    def _look(self) -> None:
        if self._pending is None:
            return
        flag, step = self._pending
        self._pending = None
        if flag.read() == 0.0:
            self.num_in_a_row = 0
            self._reports.clear()
            return
        self.num_in_a_row += 1
        self.num_skipped += 1
        message = self._report(step)
        is_over = self.num_in_a_row > self.train.max_nonfinite_steps
        if self.train.on_nonfinite == "stop" or is_over:
            self.tracker.log_artifact(self.report_file)
            in_a_row = f"; {self.num_in_a_row} steps in a row" if self.num_in_a_row > 1 else ""
            raise TrainingDivergedError(
                f"{message}{in_a_row}; more is in {self.report_file}",
                remedy="look at these rows, lower optim.lr or set optim.grad_clip; the update of the step "
                "was not applied and checkpoints from before it are unharmed",
            )
        logger.warning("%s; the update was skipped, %d in a row", message, self.num_in_a_row)

    def _report(self, step: BadStep) -> str:
        assert self._run is not None
        report = describe_step(step, self._run.context.modules)
        message = report["message"] = describe_in_words(report)
        self._reports.append(report)
        self.report_file.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "on_nonfinite": self.train.on_nonfinite,
            "max_nonfinite_steps": self.train.max_nonfinite_steps,
            "num_in_a_row": self.num_in_a_row,
            "num_skipped": self.num_skipped,
            "steps": self._reports,
        }
        write_json_atomic(self.report_file, document)
        return str(message)
