"""A step whose loss or gradient is not finite changes nothing, and is told of by head, batch and rows.

What the evidence costs, with everything else equal, is below the noise of a step on a CPU: see
`benchmarks/bench_finite.py` and `docs/log.md`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest_trainer import Built, MemoryTracker, make_recipe, parameters, run, tiny_features

from wmtp.components.trainer.callbacks import Callback, FiniteCallback, MetricsCallback
from wmtp.exceptions import TrainingDivergedError

ALGORITHMS: dict[str, dict[str, dict[str, Any]]] = {
    "baseline": {"train": {"algo": "baseline-mtp"}},
    "rho1": {"train": {"algo": "rho1-wmtp"}, "rho1": {"percentile_top_p": 0.4}},
    "critic": {"train": {"algo": "critic-wmtp"}, "critic": {"score": "value", "strength": "fixed"}},
    "running": {
        "train": {"algo": "mtp-weighted-ce", "scorer": "dft"},
        "loss": {"normalize_over": "running"},
    },
}

# A token that one row alone holds; its embedding is NaN, as a damaged vocabulary row would be.
BAD_TOKEN = 47


def finite_recipe(name: str, *, accumulation: int = 1, steps: int = 4, **train: Any) -> Any:
    """Two rows a micro-batch in the order of the data, and a learning rate that does not know the step."""
    base = {section: dict(values) for section, values in ALGORITHMS[name].items()}
    base["train"] |= {"max_steps": steps, "gradient_accumulation_steps": accumulation, **train}
    base["data"] = {"train": {"batch_size": 2, "shuffle": False}}
    base["optim"] = {"scheduler": "constant", "warmup_steps": 0}
    return make_recipe(**base)


def rows_without_bad_token(count: int, *, with_rewards: bool) -> list[dict[str, Any]]:
    """Rows none of which holds the bad token."""
    rows = tiny_features(count, with_rewards=with_rewards)
    for row in rows:
        keep = [token - 1 if token == BAD_TOKEN else token for token in row["input_ids"]]
        row["labels"] = [
            label if label == -100 else token for label, token in zip(row["labels"], keep, strict=True)
        ]
        row["input_ids"] = keep
    return rows


def spoil(row: dict[str, Any]) -> None:
    """Put the bad token into a row."""
    row["input_ids"] = [BAD_TOKEN, *row["input_ids"][1:]]


def set_bad_embedding(built: Built) -> Built:
    """Make the embedding of the bad token NaN."""
    with torch.no_grad():
        built.context.model.causal_lm.get_input_embeddings().weight[BAD_TOKEN] = math.nan
    return built


def finite_callback(recipe: Any, folder: Path) -> FiniteCallback:
    """The callback as a run has it."""
    return FiniteCallback(recipe.train, folder, MemoryTracker())


class At(Callback):
    """Does something before a step, counted from 1."""

    def __init__(self, step: int, action: Callable[[Any], None]) -> None:
        self.step = step
        self.action = action

    def on_step_start(self, run: Any) -> None:
        """Act when it is time."""
        if run.step + 1 == self.step:
            self.action(run)


class Snapshots(Callback):
    """Parameters and moments after each step."""

    def __init__(self) -> None:
        self.states: list[list[torch.Tensor]] = []

    def on_step_end(self, run: Any, result: Any) -> None:
        """Copy everything an update changes."""
        modules, optimizer = run.context.modules, run.context.optimizer.optimizer
        held = [parameter for module in modules.values() for parameter in module.parameters()]
        held += [value for state in optimizer.state.values() for value in state.values()]
        self.states.append([tensor.detach().clone() for tensor in held])


def same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether all tensors are equal, NaN being equal to itself."""
    return len(left) == len(right) and all(
        torch.equal(a.nan_to_num(nan=9e9), b.nan_to_num(nan=9e9)) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_skipped_step_leaves_no_trace_in_any_later_step(
    name: str, accumulation: int, build: Callable[..., Built], tmp_path: Path
) -> None:
    # The same rows with and without those of the bad step, the second: all other steps must be the same.
    rows_a_step = 2 * accumulation
    rows = rows_without_bad_token(6 * rows_a_step, with_rewards=name == "critic")
    without = rows[:rows_a_step] + rows[2 * rows_a_step :]
    spoil(rows[2 * rows_a_step - 1])

    snapshots = Snapshots()
    recipe = finite_recipe(name, accumulation=accumulation, on_nonfinite="skip")
    callback = finite_callback(recipe, tmp_path)
    callbacks = [callback, snapshots]
    skipping = run(set_bad_embedding(build(recipe, features=rows, callbacks=callbacks, dtype=torch.float32)))
    assert same_bits(snapshots.states[0], snapshots.states[1])
    assert not same_bits(snapshots.states[1], snapshots.states[2])
    assert callback.num_skipped == 1

    shorter = finite_recipe(name, accumulation=accumulation, steps=3)
    expected = run(set_bad_embedding(build(shorter, features=without, dtype=torch.float32)))
    assert math.isnan(skipping.losses.pop(1))
    assert [loss.hex() for loss in skipping.losses] == [loss.hex() for loss in expected.losses]
    assert same_bits(list(parameters(skipping).values()), list(parameters(expected).values()))
    one, other = (built.context.optimizer.optimizer.state_dict()["state"] for built in (skipping, expected))
    assert same_bits(
        [value for state in one.values() for value in state.values()],
        [value for state in other.values() for value in state.values()],
    )


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_bad_row_is_named_with_its_head_and_micro_batch(
    name: str, accumulation: int, build: Callable[..., Built], tmp_path: Path
) -> None:
    rows = rows_without_bad_token(24, with_rewards=name == "critic")
    bad = 4 * accumulation - 1  # the last row of the second step
    spoil(rows[bad])
    recipe = finite_recipe(name, accumulation=accumulation)
    callback = finite_callback(recipe, tmp_path)
    built = set_bad_embedding(build(recipe, features=rows, callbacks=[callback], dtype=torch.float32))
    with pytest.raises(TrainingDivergedError) as caught:
        run(built)
    message = caught.value.message
    micro_batch, number = accumulation - 1, 2 * accumulation - 1
    assert message.startswith("step 2: the cross entropy of heads [0, 1, 2] is NaN or infinite in ")
    assert f"micro-batch {micro_batch} (number {number} of the run), rows [1]: row-{bad} " in message
    assert built.trainer.training_run.step == 3  # seen at the end of the step after it
    assert built.context.callbacks[1].tracker.artifacts == [str(tmp_path / "nonfinite.json")]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads((tmp_path / "nonfinite.json").read_text(), parse_constant=refuse)
    (step,) = document["steps"]
    assert (step["step"], step["loss"], step["learning_rates"][0]) == (2, "nan", 0.01)
    assert step["gradient_norms"]["model"] == "nan"
    assert len(step["micro_batch_losses"]) == accumulation
    finding = step["findings"][0]
    assert (finding["micro_batch"], finding["global_micro_batch"]) == (micro_batch, number)
    assert (finding["heads"], finding["rows"], finding["row_ids"]) == ([0, 1, 2], [1], [[f"row-{bad}"]])
    assert all(found["micro_batch"] == micro_batch for found in step["findings"][:1])
    assert step["nonfinite_parameters"] == ["model.causal_lm.model.embed_tokens.weight"]


def test_weights_that_are_not_finite_name_the_row_they_came_from(
    build: Callable[..., Built], tmp_path: Path
) -> None:
    rows = rows_without_bad_token(24, with_rewards=False)
    for row in rows:
        row["weights"] = [1.0] * len(row["input_ids"])
    rows[10]["weights"] = [math.inf] * len(rows[10]["input_ids"])
    base = finite_recipe("running", accumulation=3, scorer="column")
    recipe = base.model_copy(update={"loss": base.loss.model_copy(update={"normalize_over": "step"})})
    callbacks = [finite_callback(recipe, tmp_path)]
    with pytest.raises(TrainingDivergedError, match=r"step 2: the scores are .* micro-batch 2 .*: row-10 "):
        run(build(recipe, features=rows, callbacks=callbacks, dtype=torch.float32))


def test_a_reward_that_is_not_a_number_names_its_row(build: Callable[..., Built], tmp_path: Path) -> None:
    rows = rows_without_bad_token(24, with_rewards=True)
    rows[5]["reward"] = math.nan
    recipe = finite_recipe("critic")
    callbacks = [finite_callback(recipe, tmp_path)]
    with pytest.raises(TrainingDivergedError, match=r"step 3: the auxiliary loss .* rows \[1\]: row-5 "):
        run(build(recipe, features=rows, callbacks=callbacks, dtype=torch.float32))


def test_a_parameter_that_became_infinite_is_named_with_the_heads_it_spoils(
    build: Callable[..., Built], tmp_path: Path
) -> None:
    def break_head(run: Any) -> None:
        with torch.no_grad():
            run.context.model.extra_heads[1].layer.mlp.down_proj.weight[3, 5] = math.inf

    recipe = finite_recipe("rho1", accumulation=3)
    callbacks = [finite_callback(recipe, tmp_path), At(2, break_head)]
    with pytest.raises(TrainingDivergedError) as caught:
        run(build(recipe, callbacks=callbacks, dtype=torch.float32))
    assert (
        "step 2: the cross entropy of heads [2] is NaN or infinite in micro-batch 0 (number 3 of the run)"
        in (caught.value.message)
    )
    assert "infinite themselves: model.extra_heads.1.layer.mlp.down_proj.weight" in caught.value.message


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_gradient_that_overflows_in_one_row_names_the_row(
    accumulation: int, build: Callable[..., Built], tmp_path: Path
) -> None:
    recipe = finite_recipe("baseline", accumulation=accumulation, on_nonfinite="skip", max_nonfinite_steps=1)
    snapshots, callback = Snapshots(), finite_callback(recipe, tmp_path)
    built = build(recipe, callbacks=[callback, snapshots], dtype=torch.float32)
    train_step = built.trainer.training_run.train_step
    original, num_forwards = train_step.forward, 0

    def overflowing(batch: Any, **options: Any) -> Any:
        nonlocal num_forwards
        output = original(batch, **options)
        num_forwards += 1
        if num_forwards == 2 * accumulation:
            mask = torch.zeros_like(output.hidden_BSHD)
            mask[1, 0, 2] = math.inf
            output.hidden_BSHD.register_hook(lambda grad: grad + mask)
        return output

    train_step.forward = overflowing  # type: ignore[method-assign]
    run(built)
    assert same_bits(snapshots.states[0], snapshots.states[1])
    (step,) = json.loads((tmp_path / "nonfinite.json").read_text())["steps"]
    assert all(math.isfinite(built.losses[index]) for index in range(4))
    row = 4 * accumulation - 1
    assert step["message"].startswith("step 2: the gradient of heads [2] is NaN or infinite in micro-batch")
    assert step["findings"][0]["row_ids"] == [[f"row-{row}"]]
    assert step["findings"][0]["global_micro_batch"] == 2 * accumulation - 1
    assert "causal_lm.model.layers.0.mlp.down_proj.weight" in step["nonfinite_gradients"]["model"]


def test_a_gradient_of_one_parameter_alone_names_the_parameter(
    build: Callable[..., Built], tmp_path: Path
) -> None:
    recipe = finite_recipe("critic")
    built = build(recipe, callbacks=[finite_callback(recipe, tmp_path)], dtype=torch.float32)
    name, weight = list(built.context.modules["value_head"].named_parameters())[-1]
    weight.register_hook(lambda grad: grad * (math.inf if built.trainer.training_run.step == 1 else 1.0))
    with pytest.raises(TrainingDivergedError, match=f"step 2: the gradient of value_head.{name} is"):
        run(built)


def test_a_loss_too_large_for_fp32_gradients_is_found_without_a_bad_row(
    build: Callable[..., Built], tmp_path: Path
) -> None:
    recipe = finite_recipe("baseline")
    recipe = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"scale": 1e36})})
    snapshots = Snapshots()
    callbacks = [finite_callback(recipe, tmp_path), snapshots]
    with pytest.raises(TrainingDivergedError, match=r"step 1: the (norm of the )?gradient of "):
        run(build(recipe, callbacks=callbacks, dtype=torch.float32))


def bad_steps(*steps: int) -> list[Callback]:
    """Make the loss of these steps NaN by a bad bias of the final norm, and right again after them."""

    def set_to(value: float) -> Callable[[Any], None]:
        def act(run: Any) -> None:
            run.context.model.final_norm.weight.data[0] = value

        return act

    return [At(step, set_to(math.nan if step in steps else 1.0)) for step in range(1, 12)]


@pytest.mark.parametrize(("allowed", "stops_at"), [(1, 3), (2, None)])
def test_only_steps_in_a_row_count(
    allowed: int, stops_at: int | None, build: Callable[..., Built], tmp_path: Path
) -> None:
    recipe = finite_recipe("baseline", steps=8, on_nonfinite="skip", max_nonfinite_steps=allowed)
    callback = finite_callback(recipe, tmp_path)
    built = build(recipe, callbacks=[callback, *bad_steps(2, 3, 5, 6)], dtype=torch.float32)
    if stops_at is None:
        run(built)
        assert (callback.num_skipped, callback.num_in_a_row) == (4, 0)
        return
    with pytest.raises(TrainingDivergedError, match=f"step {stops_at}: .*; 2 steps in a row"):
        run(built)


def test_the_last_step_is_looked_at_too(build: Callable[..., Built], tmp_path: Path) -> None:
    recipe = finite_recipe("baseline", steps=3)
    with pytest.raises(TrainingDivergedError, match="step 3: "):
        run(build(recipe, callbacks=[finite_callback(recipe, tmp_path), *bad_steps(3)], dtype=torch.float32))


class StateAfter(Callback):
    """Asks another callback for its state after a step, as a save does."""

    def __init__(self, step: int, other: Callback) -> None:
        self.step = step
        self.other = other
        self.state: dict[str, Any] = {}

    def on_step_end(self, run: Any, result: Any) -> None:
        """Save."""
        if run.step == self.step:
            self.state = self.other.state_dict()


def test_a_resumed_run_goes_on_counting(build: Callable[..., Built], tmp_path: Path) -> None:
    recipe = finite_recipe("baseline", on_nonfinite="skip", max_nonfinite_steps=2)
    first = finite_callback(recipe, tmp_path)
    after = StateAfter(2, first)
    run(build(recipe, callbacks=[first, after, *bad_steps(1, 2)], dtype=torch.float32))
    # The second step's flag was not due to be read before the third step: a save reads it.
    assert after.state == {"num_in_a_row": 2, "num_skipped": 2}
    second = finite_callback(recipe, tmp_path)
    second.load_state_dict(json.loads(json.dumps(after.state)))
    with pytest.raises(TrainingDivergedError, match="3 steps in a row"):
        run(build(recipe, callbacks=[second, *bad_steps(1)], dtype=torch.float32))


def test_a_step_that_ends_the_run_is_never_saved(build: Callable[..., Built], tmp_path: Path) -> None:
    recipe = finite_recipe("baseline")
    callback = finite_callback(recipe, tmp_path)
    after = StateAfter(2, callback)
    built = build(recipe, callbacks=[callback, after, *bad_steps(2)], dtype=torch.float32)
    with pytest.raises(TrainingDivergedError, match="step 2: "):
        run(built)
    assert built.trainer.training_run.step == 2
    assert after.state == {}


def test_means_in_the_log_are_of_the_updates_that_were_applied(
    build: Callable[..., Built], tmp_path: Path
) -> None:
    recipe = finite_recipe("baseline", on_nonfinite="skip")
    tracker = MemoryTracker()
    metrics = MetricsCallback(tracker, 4, flops_per_token=1.0, peak_flops=1.0)
    built = run(build(recipe, callbacks=[metrics, *bad_steps(2)], dtype=torch.float32))
    ((step, row),) = tracker.rows
    assert (step, row["train/nonfinite_steps"]) == (4, 1.0)
    finite = [loss for loss in built.losses if not math.isnan(loss)]
    assert len(finite) == 3
    assert row["train/loss"] == pytest.approx(sum(finite) / 3, rel=1e-6)
    assert all(math.isfinite(value) for value in row.values())
