"""Keeps a critic's influence in proportion to what it knows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from wmtp.components.pretrainer.quality import CriticQuality
from wmtp.components.scorer import CriticScorer
from wmtp.components.trainer.callbacks.base import Callback
from wmtp.tracking import Tracker

if TYPE_CHECKING:
    from wmtp.components.trainer.base import TrainingRun

logger = logging.getLogger(__name__)

# Below this the critic hardly changes the weights, which the user should know of.
_WEAK_STRENGTH = 0.1


class CriticCallback(Callback):
    """Measures the value head on held-out programs every `every_steps` updates and logs what it finds.

    With `is_calibrated`, the scorer's strength becomes max(0, 2 * AUC - 1): a blind critic trains like the
    baseline.
    """

    def __init__(
        self,
        scorer: CriticScorer,
        measure: Callable[[], CriticQuality],
        tracker: Tracker,
        *,
        every_steps: int,
        is_calibrated: bool,
    ) -> None:
        self.scorer = scorer
        self.measure = measure
        self.tracker = tracker
        self.every_steps = every_steps
        self.is_calibrated = is_calibrated
        self.latest: CriticQuality | None = None

    def on_step_start(self, run: TrainingRun) -> None:
        """Measure before the first step and then regularly, a resumed run at the same steps."""
        if run.step % self.every_steps == 0:
            quality = self._measure()
            if self.is_calibrated:
                self._calibrate(run, quality)
            self.tracker.log_metrics(self.latest_metrics(), run.step)

    def on_train_end(self, run: TrainingRun) -> None:
        """Measure once more, with the finished model.

        The strength stays as it is: it belongs to the checkpoint, and a run that goes on for more steps from
        there must weigh them as a run that had them from the start.
        """
        if run.stop_reason is None:
            self._measure()
            self.tracker.log_metrics(self.latest_metrics(), run.step)

    def _measure(self) -> CriticQuality:
        self.latest = self.measure()
        return self.latest

    def _calibrate(self, run: TrainingRun, quality: CriticQuality) -> None:
        self.scorer.strength = quality.strength
        if quality.strength < _WEAK_STRENGTH:
            logger.warning(
                "step %d: the critic separates right from wrong programs with AUC %.2f only; its "
                "weights are used at strength %.2f, so this trains like the baseline",
                run.step,
                quality.auc,
                quality.strength,
            )

    def latest_metrics(self) -> dict[str, float]:
        """The last measurement by metric name."""
        quality = self.latest
        if quality is None:
            return {}
        return {
            "critic/auc": quality.auc,
            "critic/explained_variance": quality.explained_variance,
            "critic/holdout_value_mean": quality.value_mean,
            "critic/strength": self.scorer.strength,
        }
