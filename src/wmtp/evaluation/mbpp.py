"""MBPP, full and sanitized: the zero-shot docstring prompt and the three-shot prompt of its authors.

Source: Austin et al. 2021, "Program Synthesis with Large Language Models".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from wmtp.evaluation.tasks import Task, text_fields, unix_lines
from wmtp.exceptions import DataError

# An MBPP program may hold several functions, classes, comments and top-level statements, so only what can
# follow a whole program ends it: asserts, printed examples, the next task's docstring, and prompt markers. No
# fence is among them: an answer may begin with prose and a fenced block, which is cut out afterwards.
MBPP_STOP = ("\nassert", "\nprint", '\n"""', "\n[DONE]", "\nif __name__")
# After the examples of the few-shot prompt a model ends with the marker, or goes on with the next task.
MBPP_FEW_SHOT_STOP = ("[DONE]", "\nYou are an expert Python programmer", "\nassert", "\nif __name__")
# The tasks that the authors' prompt shows.
MBPP_SHOWN_TASKS = ("2", "3", "4")


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
    description, code = text_fields(row, ("text" if is_full else "prompt", "code"), "MBPP")
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
    asserts = [unix_lines(str(test)).strip() for test in test_list]
    setup_lines = [str(line) for line in row.get("test_imports", ())] + [str(row.get("test_setup_code", ""))]
    shown_asserts = "\n".join(asserts)
    return Task(
        task_id=str(row["task_id"]),
        prompt=f'"""\n{unix_lines(description).strip()}\n{shown_asserts}\n"""\n',
        tests=shown_asserts + "\n",
        setup=unix_lines("\n".join(line for line in setup_lines if line)),
        stop=MBPP_STOP,
        reference=unix_lines(code).rstrip() + "\n",
        form="program",
        benchmark="mbpp",
    )


def few_shot_tasks(tasks: Sequence[Task], shown: Sequence[Task]) -> list[Task]:
    """Put the prompts of zero-shot MBPP tasks into the authors' few-shot form.

    Each task is asked as the paper does, the shown ones with their solutions between `[BEGIN]` and `[DONE]`::

        You are an expert Python programmer, and here is your task: <description> Your code should pass these
        tests:

        <asserts>
        [BEGIN]
        <code>
        [DONE]

    Args:
        tasks: from `mbpp_task`.
        shown: from `mbpp_task`; must have the published tasks 2, 3 and 4.

    Raises:
        DataError: one of these is not there.
    """
    by_id = {task.task_id: task for task in shown}
    missing = [task_id for task_id in MBPP_SHOWN_TASKS if task_id not in by_id]
    if missing:
        raise DataError(
            f"the three-shot prompt shows the MBPP tasks {', '.join(MBPP_SHOWN_TASKS)}; the dataset lacks "
            f"{', '.join(missing)}",
            remedy="give MBPP with its split `prompt` (tasks 1 to 10), or set eval.mbpp_shots: 0",
        )
    examples = "".join(
        f"{_asked(by_id[task_id])}{by_id[task_id].reference.rstrip()}\n[DONE]\n\n"
        for task_id in MBPP_SHOWN_TASKS
    )
    return [replace(task, prompt=f"{examples}{_asked(task)}", stop=MBPP_FEW_SHOT_STOP) for task in tasks]


def _asked(task: Task) -> str:
    asserts = task.tests.rstrip("\n")
    description = task.prompt.removeprefix('"""\n').removesuffix('\n"""\n').removesuffix(asserts).strip()
    return (
        f"You are an expert Python programmer, and here is your task: {description} "
        f"Your code should pass these tests:\n\n{asserts}\n[BEGIN]\n"
    )
