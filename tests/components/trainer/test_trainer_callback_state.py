"""What a resumed run logs is what the uninterrupted run logs: callbacks and scorers keep their state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest_trainer import Built, MemoryTracker, make_recipe, resume, run, tiny_features

from wmtp.components.pretrainer import CriticQuality
from wmtp.components.scorer import CriticScorer
from wmtp.components.trainer.callbacks import Callback, CriticCallback, MetricsCallback, ValidationCallback

# Of the machine, not of the model.
_TIMINGS = {
    "train/tokens_per_second",
    "train/mfu",
    "train/memory_peak_gib",
    "train/data_wait_ratio",
    "train/seconds_per_step",
}

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "baseline": {"train": {"algo": "baseline-mtp"}},
    "accumulation": {"train": {"algo": "rho1-wmtp", "gradient_accumulation_steps": 3}},
    "random": {"train": {"algo": "rho1-wmtp"}, "rho1": {"mode": "random"}},
    "shuffled": {"train": {"algo": "rho1-wmtp"}, "rho1": {"mode": "shuffled"}},
    "critic": {"train": {"algo": "critic-wmtp"}, "critic": {"strength": "fixed"}},
    "running": {
        "train": {"algo": "mtp-weighted-ce", "scorer": "dft"},
        "loss": {"normalize_over": "running"},
    },
}


class StopAfter(Callback):
    """Ends the run after a step, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Any, result: Any) -> None:
        """Ask for it."""
        if run.step == self.step:
            run.stop_reason = "SIGTERM"


class BadStep(Callback):
    """Spoils one step with a NaN in the final norm and mends it after."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_start(self, run: Any) -> None:
        """Break it or mend it."""
        weight = run.context.model.final_norm.weight
        if run.step + 1 in (self.step, self.step + 1):
            weight.data[0] = float("nan") if run.step + 1 == self.step else 1.0


def recipe_of(name: str, **train: Any) -> Any:
    """A recipe of seven steps with a learning rate that does not know how many there are."""
    sections = {section: dict(values) for section, values in RECIPES[name].items()}
    sections["train"] = {**sections["train"], "max_steps": 7, "on_nonfinite": "skip", **train}
    sections["data"] = {"train": {"batch_size": 2}}
    sections["optim"] = {"scheduler": "constant", "warmup_steps": 0}
    return make_recipe(**sections)


def metrics_callback(tracker: MemoryTracker, every_steps: int = 3) -> MetricsCallback:
    """The callback as a run has it."""
    return MetricsCallback(tracker, every_steps, flops_per_token=1.0, peak_flops=1.0)


def exact(tracker: MemoryTracker) -> list[tuple[int, dict[str, str]]]:
    """All logged numbers to the last bit, but timings."""
    return [
        (step, {name: value.hex() for name, value in row.items() if name not in _TIMINGS})
        for step, row in tracker.rows
    ]


@pytest.mark.parametrize(
    ("name", "stop"), [*((name, 5) for name in RECIPES), *(("baseline", stop) for stop in (1, 4, 6))]
)
def test_a_stop_between_two_log_lines_changes_none_of_them(
    name: str, stop: int, build: Callable[..., Built]
) -> None:
    recipe = recipe_of(name)
    whole = MemoryTracker()
    callbacks = [BadStep(5), metrics_callback(whole)]
    uninterrupted = run(build(recipe, dtype=torch.float32, callbacks=callbacks))

    parts = MemoryTracker()
    first = run(
        build(
            recipe,
            dtype=torch.float32,
            callbacks=[BadStep(5), metrics_callback(parts), StopAfter(stop)],
        )
    )
    second = run(resume(first, recipe, [BadStep(5), metrics_callback(parts)], dtype=torch.float32))
    assert first.trainer.training_run.step == stop
    assert exact(parts) == exact(whole)
    assert [step for step, _ in whole.rows] == [3, 6, 7]
    assert second.trainer.training_run.num_tokens == uninterrupted.trainer.training_run.num_tokens


def test_a_finished_run_that_is_given_more_steps_logs_whole_windows(build: Callable[..., Built]) -> None:
    whole, parts = MemoryTracker(), MemoryTracker()
    uninterrupted = run(build(recipe_of("baseline"), callbacks=[metrics_callback(whole)]))
    shorter = recipe_of("baseline", max_steps=5)
    first = run(build(shorter, callbacks=[metrics_callback(parts)]))
    second = run(resume(first, recipe_of("baseline"), [metrics_callback(parts)]))
    # The shorter run's last line is one more; the others are the same.
    assert [step for step, _ in parts.rows] == [3, 5, 6, 7]
    assert [row for row in exact(parts) if row[0] != 5] == exact(whole)
    assert second.trainer.training_run.num_tokens == uninterrupted.trainer.training_run.num_tokens


def test_a_validated_end_is_not_validated_again(build: Callable[..., Built]) -> None:
    tracker, recipe = MemoryTracker(), recipe_of("baseline", max_steps=2)

    def callback() -> ValidationCallback:
        return ValidationCallback(lambda: {"val/loss": 1.0}, tracker, 5)

    first = run(build(recipe, callbacks=[callback()]))
    run(resume(first, recipe, [callback()]))
    assert tracker.rows == [(2, {"val/loss": 1.0})]


def test_the_last_measurement_of_a_critic_does_not_change_what_a_longer_run_trains_with(
    build: Callable[..., Built],
) -> None:
    def train(max_steps: int, before: Built | None) -> tuple[Built, CriticScorer]:
        recipe = make_recipe(
            train={"algo": "critic-wmtp", "max_steps": max_steps},
            data={"train": {"batch_size": 2}},
            optim={"scheduler": "constant", "warmup_steps": 0},
        )
        options: dict[str, Any] = {"features": tiny_features(with_rewards=True), "dtype": torch.float32}
        built = build(recipe, **options) if before is None else resume(before, recipe, **options)
        scorer = built.context.scorer
        assert isinstance(scorer, CriticScorer)

        def measure() -> CriticQuality:
            # As good as the critic is at this step.
            auc = 0.6 + 0.04 * built.trainer.training_run.step
            return CriticQuality(auc, 0.0, 0.0, num_right=1, num_wrong=1)

        callback = CriticCallback(scorer, measure, MemoryTracker(), every_steps=4, is_calibrated=True)
        built.context.callbacks = [*built.context.callbacks, callback]
        return run(built), scorer

    whole, _ = train(6, None)
    first, scorer = train(3, None)
    assert scorer.strength == pytest.approx(0.2)
    second, _ = train(6, first)
    assert [loss.hex() for loss in first.losses + second.losses] == [loss.hex() for loss in whole.losses]
