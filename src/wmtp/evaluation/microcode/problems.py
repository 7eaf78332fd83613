"""Seeded MicroCode problems: what is asked, a right program, and tests that tell it from a wrong one."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from wmtp.evaluation.microcode.operations import (
    REDUCERS,
    TRANSFORMS,
    VARIABLE,
    Family,
    Operation,
    Semantics,
    Value,
    bind,
)

Split = Literal["train", "validation", "test"]
"""`test` holds compositions that are never in the other two, for any seed; `validation` holds other
instructions for the compositions of `train`."""

ENTRY_POINT = "f"
"""The name of every MicroCode function."""

_HELD_OUT_SHARE = 18  # percent of the compositions of two and more steps
_VALIDATION_SHARE = 10  # percent of the instructions of the other compositions
_TEXT_SHARE = 0.25
_REDUCER_SHARE = 0.4
_NUM_STEPS_WEIGHTS = {1: 0.1, 2: 0.45, 3: 0.45}
# Pitfalls are asked for more often, so that there is enough of them to tell algorithms and critics apart.
_TRANSFORM_WEIGHTS: dict[Family, tuple[int, ...]] = {
    family: tuple(3 if operation.is_pitfall else 2 for operation in operations)
    for family, operations in TRANSFORMS.items()
}
_NUM_TESTS = 5
_WORDS = (
    "Ada",
    "bird",
    "Cat",
    "dune",
    "Elm",
    "fox",
    "Gold",
    "ink",
    "jar",
    "Kite",
    "lamp",
    "Moss",
    "oak",
    "Pine",
)


@dataclass(frozen=True, slots=True)
class Line:
    """One step as written, rightly or wrongly: an expression and what it does."""

    expression: str
    apply: Semantics
    constant: int | None


@dataclass(frozen=True, slots=True)
class Step:
    """One step as asked: an operation with its constant and the phrase chosen for it."""

    operation: Operation
    constant: int | None
    phrase: str

    def right(self) -> Line:
        """Return the step written as asked."""
        return Line(self.operation.expression, self.operation.apply, self.constant)

    def slip(self) -> Line:
        """Return the step written with the operation's typical mistake."""
        return Line(self.operation.slip_expression, self.operation.slip_apply, self.constant)


@dataclass(frozen=True, slots=True)
class Draft:
    """A problem before noise: its steps, its test inputs and the results its tests expect."""

    family: Family
    steps: tuple[Step, ...]
    inputs: tuple[Value, ...]
    expected: tuple[Value, ...]

    @property
    def composition(self) -> tuple[str, ...]:
        """Names of the operations in order."""
        return tuple(step.operation.name for step in self.steps)


def is_held_out(composition: tuple[str, ...]) -> bool:
    """Whether a composition belongs to the test split: a matter of its names, the same for every seed.

    Single operations are never held out: what is tested is putting known steps together in an unknown way.
    """
    return len(composition) > 1 and _bucket("+".join(composition)) < _HELD_OUT_SHARE


def instruction_of(steps: Sequence[Step]) -> str:
    """Say the steps in English."""
    return ", then ".join(step.phrase for step in steps)


def prompt_of(family: Family, instruction: str) -> str:
    """Write the prompt: the instruction as a comment, then the function's signature."""
    return f"# {instruction}\ndef {ENTRY_POINT}({VARIABLE[family]}):\n"


def body_lines(family: Family, lines: Sequence[Line]) -> list[str]:
    """Write a program's body, one line a step."""
    targets = [f"{VARIABLE[family]} ="] * (len(lines) - 1) + ["return"]
    return [
        f"    {target} {bind(line.expression, line.constant)}"
        for target, line in zip(targets, lines, strict=True)
    ]


def interpret(lines: Sequence[Line], argument: Value) -> Value:
    """Return what a program gives for an argument, from the meaning of its steps: no text is executed."""
    value = argument
    for line in lines:
        value = line.apply(value, line.constant)
    return value


def write_tests(draft: Draft) -> str:
    """Write the asserts of a problem."""
    return "".join(
        f"assert {ENTRY_POINT}({argument!r}) == {result!r}\n"
        for argument, result in zip(draft.inputs, draft.expected, strict=True)
    )


def draw_draft(rng: random.Random, split: Split) -> Draft:
    """Draw one problem of a split in which every step matters and every typical mistake fails a test."""
    while True:
        family: Family = "text" if rng.random() < _TEXT_SHARE else "ints"
        operations = _draw_operations(rng, family)
        if is_held_out(tuple(operation.name for operation in operations)) is not (split == "test"):
            continue
        steps = tuple(_draw_step(rng, operation) for operation in operations)
        if split != "test" and _is_validation(instruction_of(steps)) is not (split == "validation"):
            continue
        inputs = _draw_inputs(rng, family, steps)
        lines = [step.right() for step in steps]
        draft = Draft(family, steps, inputs, tuple(interpret(lines, argument) for argument in inputs))
        if _is_discriminating(draft):
            return draft


def _draw_operations(rng: random.Random, family: Family) -> list[Operation]:
    num_steps = rng.choices(tuple(_NUM_STEPS_WEIGHTS), tuple(_NUM_STEPS_WEIGHTS.values()))[0]
    has_reducer = rng.random() < _REDUCER_SHARE
    operations: list[Operation] = []
    while len(operations) < num_steps - has_reducer:
        operation = rng.choices(TRANSFORMS[family], _TRANSFORM_WEIGHTS[family])[0]
        if operation not in operations:
            operations.append(operation)
    return operations + ([rng.choice(REDUCERS[family])] if has_reducer else [])


def _draw_step(rng: random.Random, operation: Operation) -> Step:
    constant = rng.choice(operation.constants) if operation.constants else None
    return Step(operation, constant, bind(rng.choice(operation.phrases), constant))


def _draw_inputs(rng: random.Random, family: Family, steps: Sequence[Step]) -> tuple[Value, ...]:
    if family == "text":
        return tuple(" ".join(rng.sample(_WORDS, rng.randint(2, 3))) for _ in range(_NUM_TESTS))
    # The constants and their neighbours are among the numbers, so that a bound off by one shows.
    constants = [step.constant for step in steps if step.constant is not None]
    inputs: list[Value] = []
    for _ in range(_NUM_TESTS):
        near = [constant - rng.randint(0, 1) for constant in constants]
        numbers = rng.choices(range(-9, 21), k=rng.randint(4, 7)) + near
        rng.shuffle(numbers)
        inputs.append(numbers)
    return tuple(inputs)


def _is_discriminating(draft: Draft) -> bool:
    """Whether the results vary, every step changes them, and every step's slip changes them."""
    lines = [step.right() for step in draft.steps]
    if draft.expected.count(draft.expected[0]) == len(draft.expected):
        return False
    for index, step in enumerate(draft.steps):
        if not fails(draft, [*lines[:index], step.slip(), *lines[index + 1 :]]):
            return False
        if not step.operation.is_reducer and not fails(draft, lines[:index] + lines[index + 1 :]):
            return False
    return True


def fails(draft: Draft, lines: Sequence[Line]) -> bool:
    """Whether a program fails at least one test of a problem."""
    return any(
        interpret(lines, argument) != result
        for argument, result in zip(draft.inputs, draft.expected, strict=True)
    )


def _is_validation(instruction: str) -> bool:
    return _bucket(instruction) < _VALIDATION_SHARE


@lru_cache(maxsize=1 << 16)
def _bucket(text: str) -> int:
    # Python's own hash of a text differs from process to process; this one never does.
    return zlib.crc32(text.encode()) % 100
