"""From what a model wrote to the program that is run.

Models wrap programs in prose, in fenced blocks and in markers, and go on after the end. What is cut away is
decided by the text alone: never by running it, and never by the tests.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Final

from wmtp.evaluation.tasks import Task, cut_at_stop, unix_lines

BEGIN_MARKER: Final = "[BEGIN]"
DONE_MARKER: Final = "[DONE]"
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*([\w+-]*)[ \t]*$", re.MULTILINE)
_PYTHON: Final = frozenset({"", "python", "python3", "py", "py3"})
_INDENTED = re.compile(r"^[ \t]+\S", re.MULTILINE)
# What follows a whole function that answers a prompt which had begun it.
_REWRITTEN_STOP: Final = ("\nassert", "\nprint", "\nif __name__")
_TOP_LEVEL = re.compile(r"^[^\s#]", re.MULTILINE)
# Bounds the work that a hostile text can make: so many characters, so many times.
_MAX_PARSED_CHARS: Final = 50_000
_MAX_ENDINGS: Final = 60


def assemble_program(task: Task, completion: str) -> str:
    """Return the program to execute for what a model wrote after the task's prompt.

    In this order:

    1. Markers: what follows `[DONE]` goes, and so does everything up to a `[BEGIN]`.
    2. Fences: where no program stands before the first fence line, the first block in Python (or in no named
       language) that holds something is the answer; otherwise the text ends at the fence. A block without an
       end goes to the end of the text.
    3. Stop strings of the task. An answer that writes the asked function again, from its `def` on, ends at
       asserts, prints and main blocks after it instead, and its prefix is closed with `pass`.
    4. End of the program: top-level lines are dropped from the end until the rest is Python, so that an
       explanation after the function does no harm. A text of which nothing is Python stays as it is and
       fails when it is run.

    The result begins with `task.program_prefix` (HumanEval: the prompt). Tasks of the form `text` are not
    touched but for the stop strings.
    """
    if task.form == "text":
        return task.program_prefix + cut_at_stop(completion, task.stop)
    text = unix_lines(completion)
    text = text.partition(DONE_MARKER)[0]
    before, begin, after = text.partition(BEGIN_MARKER)
    text = after.removeprefix("\n") if begin else before
    text = _cut(task, _unfenced(task, text))
    prefix = _prefix_for(task, text)
    return prefix + _python_part(prefix, text)


def opens_fence(text: str) -> bool:
    """Whether a text has begun a fenced block that it does not end."""
    return len(_FENCE.findall(text)) % 2 == 1


def is_python(source: str) -> bool:
    """Whether a text is a Python program that does something; texts that are too long are not."""
    if len(source) > _MAX_PARSED_CHARS:
        return False
    try:
        with warnings.catch_warnings():
            # Of invalid escapes; the program's own business.
            warnings.simplefilter("ignore")
            return bool(ast.parse(source).body)
    # What the parser raises on a text that is not Python: bad syntax, null bytes, too deep an expression.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _unfenced(task: Task, text: str) -> str:
    fences = list(_FENCE.finditer(text))
    if not fences:
        return text
    # Before a fence, and where the fence is part of a string, there may be the whole program already.
    for program in (text[: fences[0].start()], text):
        cut = _cut(task, program)
        if cut.strip() and is_python(_prefix_for(task, cut) + cut):
            return program
    for number, fence in enumerate(fences):
        # Every second line closes a block; a closing fence names no language.
        if number % 2 == 0 and fence[1].lower() in _PYTHON:
            end = fences[number + 1].start() if number + 1 < len(fences) else len(text)
            block = text[fence.end() : end].removeprefix("\n")
            if block.strip():
                return block
    return text[: fences[0].start()]


def _cut(task: Task, text: str) -> str:
    again = _asked_again(task, text)
    if again is None:
        return cut_at_stop(text, task.stop)
    return text[: again.end()] + cut_at_stop(text[again.end() :], _REWRITTEN_STOP)


def _prefix_for(task: Task, text: str) -> str:
    """The task's prefix, closed where the text writes the asked function again."""
    if _asked_again(task, text) is None:
        return task.program_prefix
    return f"{task.program_prefix.rstrip()}\n    pass\n\n"


def _asked_again(task: Task, text: str) -> re.Match[str] | None:
    if task.form != "completion" or not task.entry_point:
        return None
    again = re.search(rf"^def {re.escape(task.entry_point)}\b", text, re.MULTILINE)
    # After a body of its own it is the next function, whatever its name.
    return again if again is not None and not _INDENTED.search(text[: again.start()]) else None


def _python_part(prefix: str, text: str) -> str:
    """The text without the top-level lines at its end that keep it from being Python."""
    if is_python(prefix + text):
        return text
    # An indented answer continues the prefix, so a top-level line at its start is no end of it.
    ends = [match.start() for match in _TOP_LEVEL.finditer(text) if match.start() > 0]
    for end in ends[: -_MAX_ENDINGS - 1 : -1]:
        if is_python(prefix + text[:end]) and text[:end].strip():
            return text[:end]
    return text
