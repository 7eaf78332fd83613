"""What a programming benchmark asks: a prompt, tests, and how a completion becomes a whole program.

A `Task` knows nothing of models or sandboxes. Benchmarks differ in their rows only; each has one function
that turns a row into a `Task` (here HumanEval; `mbpp`, `contests`, `custom` and `microcode` beside it).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from wmtp.exceptions import DataError

# Chen et al. 2021 ("Evaluating Large Language Models Trained on Code"), section 3.
HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

# What a model writes: the rest of a program that `program_prefix` begins, a whole program, or any text.
TaskForm = Literal["completion", "program", "text"]


@dataclass(frozen=True, slots=True)
class Task:
    """One programming problem with the tests that judge it.

    Attributes:
        task_id: unique within its dataset, such as `HumanEval/0`.
        prompt: what the model is given.
        tests: source of asserts, run on the trusted side; empty where `cases` judge, or nothing does.
        setup: helpers for the tester, run on the trusted side before the tests.
        program_prefix: what stands before the completion to make a whole program (HumanEval: the prompt).
        stop: strings that end a completion; neither they nor anything after them belong to the program.
        reference: a right completion, empty when unknown.
        timeout_s: wall-clock limit of one run of the tests (of each of `cases`), in seconds; None takes the
            caller's.
        memory_mib: address space of one run, in MiB; None takes the caller's.
        cases: standard input and expected output of each run, in order, in place of `tests`.
        other_references: further right completions.
        entry_point: the function that is asked for, where its name is known.
        form: what the model is expected to write.
        benchmark: the kind of row it was made of.
    """

    task_id: str
    prompt: str
    tests: str
    setup: str = ""
    program_prefix: str = ""
    stop: tuple[str, ...] = ()
    reference: str = ""
    timeout_s: float | None = None
    memory_mib: int | None = None
    cases: tuple[tuple[str, str], ...] = ()
    other_references: tuple[str, ...] = ()
    entry_point: str = ""
    form: TaskForm = "completion"
    benchmark: Literal["humaneval", "mbpp", "contest", "microcode", "custom"] = "custom"

    @property
    def has_tests(self) -> bool:
        """Whether a program can be judged."""
        return bool(self.tests or self.cases)

    @property
    def references(self) -> tuple[str, ...]:
        """All known right completions."""
        return (self.reference, *self.other_references) if self.reference else self.other_references


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return `text` up to the earliest occurrence of any string of `stop`, or all of it."""
    positions = [position for string in stop if (position := text.find(string)) >= 0]
    return text[: min(positions)] if positions else text


def humaneval_task(row: Mapping[str, Any]) -> Task:
    """Turn a HumanEval row into a task.

    The prompt is both what the model is given and how the program begins, and `check(entry_point)` runs the
    tests (Chen et al. 2021). What the prompt defines besides the entry point (`poly`, `encode_cyclic`) is
    given to the tester as `setup`, so that a completion which redefines such a helper cannot bend the test
    that uses it.

    Raises:
        DataError: a field is missing, or the prompt is not Python.
    """
    task_id, prompt, test, entry_point = text_fields(
        row, ("task_id", "prompt", "test", "entry_point"), "HumanEval"
    )
    return Task(
        task_id=task_id,
        prompt=prompt,
        tests=f"{test}\n\ncheck({entry_point})\n",
        setup=_prompt_helpers(prompt, entry_point, task_id),
        program_prefix=prompt,
        stop=HUMANEVAL_STOP,
        reference=str(row.get("canonical_solution", "")),
        entry_point=entry_point,
        benchmark="humaneval",
    )


def unix_lines(text: str) -> str:
    """Turn the line ends CRLF and CR into LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_fields(row: Mapping[str, Any], fields: Sequence[str], dataset: str) -> list[str]:
    """Return the row's fields as texts.

    Raises:
        DataError: one is missing, or neither text nor a whole number.
    """
    for field in fields:
        if not isinstance(row.get(field), str | int):
            raise DataError(
                f"{dataset} row has no text in field {field!r}; it has {sorted(row)}",
                remedy=f"use the published fields of {dataset}",
            )
    return [str(row[field]) for field in fields]


def _prompt_helpers(prompt: str, entry_point: str, task_id: str) -> str:
    try:
        # A prompt that ends with its docstring is a function; one that ends in its signature needs `pass`.
        module = ast.parse(prompt + "\n    pass\n")
    except SyntaxError as error:
        raise DataError(
            f"HumanEval row {task_id!r}: the prompt is not Python ({error.msg}, line {error.lineno})",
            remedy="check the row; a prompt is a function's signature and docstring",
        ) from error
    helpers = [
        node for node in module.body if not (isinstance(node, ast.FunctionDef) and node.name == entry_point)
    ]
    return "\n".join(ast.unparse(node) for node in helpers)
