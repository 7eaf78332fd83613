"""Rows of the user's own: a prompt with a completion, and tests where programs are to be judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wmtp.evaluation.tasks import Task, unix_lines
from wmtp.exceptions import DataError


def custom_task(row_id: str, row: Mapping[str, Any]) -> Task | None:
    """Turn a custom row with a prompt into a task; None for rows that have none (`text`, `messages`).

    `completion` is the reference. With `tests`, source of asserts or a list of them, the completion is judged
    as a program; where `prompt_is_code` is true the program begins with the prompt, else it is the completion
    alone. `setup` helps the tests, `stop` lists strings that end a completion, and `task_id` names the row.
    Without tests any text is expected, and only exact match can be measured.

    Raises:
        DataError: a field is of the wrong type.
    """
    if "prompt" not in row:
        return None
    prompt, reference = _text(row, "prompt"), _text(row, "completion")
    tests = row.get("tests", "")
    if _is_texts(tests):
        tests = "\n".join(tests)
    if not isinstance(tests, str):
        raise DataError(f"field 'tests' must be source of asserts, or a list of them; got {tests!r}")
    stop = row.get("stop", [])
    if not _is_texts(stop) or not all(stop):
        raise DataError(f"field 'stop' must be a list of texts that are not empty; got {stop!r}")
    prompt_is_code = row.get("prompt_is_code", False)
    if not isinstance(prompt_is_code, bool):
        raise DataError(f"field 'prompt_is_code' must be true or false; got {prompt_is_code!r}")
    has_tests = bool(tests.strip())
    return Task(
        task_id=str(row.get("task_id", row_id)),
        prompt=prompt,
        tests=unix_lines(tests).strip() + "\n" if has_tests else "",
        setup=unix_lines(_text(row, "setup")),
        program_prefix=prompt if has_tests and prompt_is_code else "",
        stop=tuple(stop),
        reference=reference,
        form=("completion" if prompt_is_code else "program") if has_tests else "text",
        benchmark="custom",
    )


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field, "")
    if not isinstance(value, str):
        raise DataError(f"field {field!r} must be text; got {value!r}")
    return value


def _is_texts(value: Any) -> bool:
    return (
        isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
    )
