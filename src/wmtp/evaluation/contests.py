"""CodeContests: programs that read standard input and print the answer.

Source: Li et al. 2022, "Competition-level code generation with AlphaCode", and the published rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from wmtp.evaluation.tasks import Task, unix_lines
from wmtp.exceptions import DataError

# The program begins after the docstring of the prompt and may hold anything; a second docstring is the next
# problem's.
CONTEST_STOP: Final = ('\n"""', "\n[DONE]")
# Languages of the published solutions: unknown, python2, cpp, python3, java.
PYTHON3: Final = (3, "PYTHON3")
# What the interpreter itself may use besides; the authors' own sandbox adds as much.
_INTERPRETER_MIB: Final = 32
_TESTS: Final = ("public_tests", "private_tests", "generated_tests")


def contest_prompt(description: str) -> str:
    """What a model is given of a problem: its description as the program's docstring."""
    return f'"""\n{unix_lines(description).strip()}\n"""\n'


def contest_task(row_id: str, row: Mapping[str, Any]) -> Task:
    """Turn a CodeContests row into a task for Python 3 programs.

    All public, private and generated tests are run, in this order. Time and memory are the problem's own
    where the row has them, for each test; memory with the interpreter's share added.

    Raises:
        DataError: a field is of the wrong type.
    """
    cases = [case for field in _TESTS for case in _cases(row.get(field) or (), field)]
    # Some problems name files to read and write; as programs on standard input they cannot be judged.
    if row.get("input_file") or row.get("output_file"):
        cases = []
    right = [
        unix_lines(source).rstrip() + "\n"
        for language, source in solutions(row.get("solutions") or (), "solutions")
        if language in PYTHON3
    ]
    memory = _number(row.get("memory_limit_bytes") or 0, "memory_limit_bytes")
    return Task(
        task_id=str(row.get("name") or row_id),
        prompt=contest_prompt(_text(row, "description")),
        tests="",
        stop=CONTEST_STOP,
        reference=right[0] if right else "",
        other_references=tuple(right[1:]),
        timeout_s=_seconds(row.get("time_limit")),
        memory_mib=math.ceil(memory / 2**20) + _INTERPRETER_MIB if memory else None,
        cases=tuple(cases),
        form="program",
        benchmark="contest",
    )


def solutions(value: Any, field: str) -> list[tuple[Any, str]]:
    """Pairs of language and source, from columns (as published) or from a list of records.

    Raises:
        DataError: neither of the two, or a source that is not text.
    """
    pairs = _pairs(value, field, "language", "solution")
    if not all(isinstance(source, str) for _, source in pairs):
        raise DataError(f"field {field!r} has a solution that is not text")
    return pairs


def _cases(value: Any, field: str) -> list[tuple[str, str]]:
    pairs = _pairs(value, field, "input", "output")
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise DataError(f"field {field!r} has an input or output that is not text")
    return pairs


def _pairs(value: Any, field: str, first: str, second: str) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping) and {first, second} <= set(value):
        left, right = value[first], value[second]
        if any(not isinstance(column, Sequence) or isinstance(column, str) for column in (left, right)):
            raise DataError(f"field {field!r}: {first} and {second} must be lists")
        if len(left) != len(right):
            raise DataError(f"field {field!r} has {len(left)} {first}s and {len(right)} {second}s")
        return list(zip(left, right, strict=True))
    if (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(item, Mapping) and {first, second} <= set(item) for item in value)
    ):
        return [(item[first], item[second]) for item in value]
    raise DataError(f"field {field!r} must hold {first} and {second}; got {repr(value)[:80]}")


def _seconds(value: Any) -> float | None:
    """A published time limit: `{"seconds": 2, "nanos": 500000000}`, or a number of seconds; 0 is unknown."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        seconds = _number(value.get("seconds") or 0, "time_limit.seconds")
        total = seconds + _number(value.get("nanos") or 0, "time_limit.nanos") / 1e9
    else:
        total = _number(value, "time_limit")
    return total or None


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise DataError(f"field {field!r} must be a number that is not negative; got {value!r}")
    return float(value)


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"field {field!r} must be text that is not empty; got {value!r}")
    return value
