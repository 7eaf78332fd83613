"""What a programming benchmark asks: a prompt, tests, and how a completion becomes a whole program.

A `Task` knows nothing of models or sandboxes. Benchmarks differ in their rows only; each has one function
here that turns a published row into a `Task`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wmtp.exceptions import DataError

# Chen et al. 2021 ("Evaluating Large Language Models Trained on Code"), section 3.
HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# An MBPP program may hold several functions, classes, comments and top-level statements, so only what can
# follow a whole program ends it: asserts, printed examples, the next task's docstring, and prompt markers.
MBPP_STOP = ("\nassert", "\nprint", '\n"""', "\n[DONE]", "\n```", "\nif __name__")


@dataclass(frozen=True, slots=True)
class Task:
    """One programming problem with the tests that judge it.

    Attributes:
        task_id: unique within its dataset, such as `HumanEval/0`.
        prompt: what the model is given.
        tests: source of asserts, run on the trusted side.
        setup: helpers for the tester, run on the trusted side before the tests.
        program_prefix: what stands before the completion to make a whole program (HumanEval: the prompt).
        stop: strings that end a completion; neither they nor anything after them belong to the program.
        reference: a right completion, empty when unknown.
        timeout_s: wall-clock limit of one run of the tests, in seconds, where the caller sets none.
    """

    task_id: str
    prompt: str
    tests: str
    setup: str = ""
    program_prefix: str = ""
    stop: tuple[str, ...] = ()
    reference: str = ""
    timeout_s: float = 10.0


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return `text` up to the earliest occurrence of any string of `stop`, or all of it."""
    positions = [position for string in stop if (position := text.find(string)) >= 0]
    return text[: min(positions)] if positions else text


def assemble_program(task: Task, completion: str) -> str:
    """Return the program to execute: `task.program_prefix`, then the completion cut at `task.stop`."""
    return task.program_prefix + cut_at_stop(completion, task.stop)


def humaneval_task(row: Mapping[str, Any]) -> Task:
    """Turn a HumanEval row into a task.

    The prompt is the row's own (imports, helpers, signature, docstring) and also begins the program. Whatever
    the prompt defines besides the entry point (`poly`, `encode_cyclic`) is given to the tester as `setup`,
    so that a completion which redefines such a helper cannot bend the test that uses it.

    Raises:
        DataError: a field is missing, or the prompt is not Python.
    """
    task_id, prompt, test, entry_point = _texts(
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
    )


def mbpp_task(row: Mapping[str, Any]) -> Task:
    '''Turn an MBPP row, full (`text`) or sanitized (`prompt`), into a zero-shot task.

    The prompt is a docstring with the description and the asserts, which alone tell the function's name; the
    completion is a whole program that starts on the next line::

        """
        Write a function to find the similar elements from the given two tuple lists.
        assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)
        """

    The form is that of Fried et al. 2022 (InCoder), all asserts shown as in Austin et al. 2021. Line ends
    of the published file (CRLF in part) become LF.

    Raises:
        DataError: a field is missing or of the wrong type.
    '''
    is_full = "text" in row
    description, code = _texts(row, ("text" if is_full else "prompt", "code"), "MBPP")
    if "task_id" not in row or "test_list" not in row:
        missing = "task_id" if "task_id" not in row else "test_list"
        raise DataError(
            f"MBPP row has no field {missing!r}; it has {sorted(row)}",
            remedy="use the published fields of MBPP",
        )
    test_list = row["test_list"]
    if not isinstance(test_list, Sequence) or isinstance(test_list, str) or not test_list:
        raise DataError(
            f"MBPP row {row['task_id']!r}: test_list must be a non-empty list of asserts, got {test_list!r}",
            remedy="give at least one assert",
        )
    asserts = [_unix_lines(str(test)).strip() for test in test_list]
    setup_lines = [str(line) for line in row.get("test_imports", ())] + [str(row.get("test_setup_code", ""))]
    shown_asserts = "\n".join(asserts)
    return Task(
        task_id=str(row["task_id"]),
        prompt=f'"""\n{_unix_lines(description).strip()}\n{shown_asserts}\n"""\n',
        tests=shown_asserts + "\n",
        setup=_unix_lines("\n".join(line for line in setup_lines if line)),
        stop=MBPP_STOP,
        reference=_unix_lines(code).rstrip() + "\n",
    )


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _texts(row: Mapping[str, Any], fields: Sequence[str], dataset: str) -> list[str]:
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
