"""What a row is, seen from its fields (MBPP, HumanEval, CodeContests, custom), and the row as examples.

Converters raise `DataError` without a location; the loader, which knows file and line, adds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from wmtp.components.data.examples import Example, Weight
from wmtp.evaluation import Task, contest_prompt, contest_task, custom_task, humaneval_task, mbpp_task
from wmtp.evaluation.contests import PYTHON3, solutions
from wmtp.exceptions import DataError

Fields: TypeAlias = Mapping[str, Any]
Split: TypeAlias = Literal["train", "validation", "test", "prompt"]

_ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True, slots=True)
class RowFormat:
    """A kind of row.

    Attributes:
        name: what messages call it.
        forms: the sets of fields of which a row must have one whole; more fields are welcome.
        convert: makes a row's examples from its id and fields.
        to_task: makes the task that a row asks from its id and fields; None where it asks none.
        split_of: the split a row belongs to, for formats whose rows tell; None where they do not.
    """

    name: str
    forms: tuple[tuple[str, ...], ...]
    convert: Callable[[str, Fields], list[Example]]
    to_task: Callable[[str, Fields], Task | None]
    split_of: Callable[[Fields], Split] | None = None

    def accepts(self, fields: Fields) -> bool:
        """Whether a row has all fields of one of the forms."""
        return any(all(field in fields for field in form) for form in self.forms)


def recognise(fields: Fields) -> RowFormat | None:
    """The format of a row by its fields, None when it is none of the known ones."""
    for row_format in FORMATS:
        if row_format.accepts(fields):
            return row_format
    return None


def missing_fields(fields: Fields, row_format: RowFormat | None) -> tuple[str, str]:
    """Problem and remedy of a row that fits no format, or not the one of the rows before it."""
    found = ", ".join(sorted(fields)) or "none"
    accepted = FORMATS if row_format is None else (row_format,)
    forms = "; ".join(f"{known.name}: {' + '.join(form)}" for known in accepted for form in known.forms)
    before = "" if row_format is None else f" of {row_format.name}, which the rows before are"
    return f"the row lacks the fields{before}; found {found}", f"accepted are {forms}"


def mbpp_split(fields: Fields) -> Split:
    """The published split of an MBPP row, full or sanitized, by its task id (Austin et al. 2021)."""
    task_id = fields["task_id"]
    if not isinstance(task_id, int) or isinstance(task_id, bool) or task_id < 1:
        raise DataError(f"task_id must be a positive whole number, which tells the split; got {task_id!r}")
    if task_id <= 10:
        return "prompt"
    if task_id <= 510:
        return "test"
    return "validation" if task_id <= 600 else "train"


def _mbpp_task(row_id: str, fields: Fields) -> Task:
    return mbpp_task(fields)


def _mbpp_examples(row_id: str, fields: Fields) -> list[Example]:
    task = mbpp_task(fields)
    return [Example(row_id, task.prompt, task.reference, task=task)]


def _humaneval_task(row_id: str, fields: Fields) -> Task:
    return humaneval_task({"task_id": row_id, **fields})


def _humaneval_examples(row_id: str, fields: Fields) -> list[Example]:
    task = _humaneval_task(row_id, fields)
    return [Example(row_id, task.prompt, task.reference, task=task)]


def _contest_examples(row_id: str, fields: Fields) -> list[Example]:
    """One example per Python 3 solution: reward +1 for a right one, -1 for a wrong one."""
    prompt = contest_prompt(_text(fields, "description"))
    examples = []
    for field, reward in (("solutions", 1.0), ("incorrect_solutions", -1.0)):
        for number, (language, solution) in enumerate(solutions(fields.get(field, ()), field)):
            if language in PYTHON3:
                completion = _unix_lines(solution).rstrip() + "\n"
                examples.append(Example(f"{row_id}#{field}[{number}]", prompt, completion, reward=reward))
    return examples


def _custom_examples(row_id: str, fields: Fields) -> list[Example]:
    reward = None if "reward" not in fields else _finite(fields["reward"], "reward")
    if "messages" in fields:
        messages, weight = _messages(fields)
        return [Example(row_id, "", "", reward=reward, weight=weight, messages=messages)]
    weight = _weight(fields)
    if "prompt" in fields and "completion" not in fields and "text" not in fields:
        # A problem with tests and no answer: it can be asked, not learnt from.
        return []
    if "completion" in fields and "prompt" in fields:
        prompt, completion = _text(fields, "prompt", may_be_empty=True), _text(fields, "completion")
    else:
        prompt, completion = "", _text(fields, "text")
    _check_spans(weight, len(prompt) + len(completion))
    return [Example(row_id, prompt, completion, reward=reward, weight=weight)]


def _messages(fields: Fields) -> tuple[tuple[dict[str, str], ...], Weight | None]:
    """The turns of a chat and their weights, from `weights` of the row or `weight` of the messages."""
    value = fields["messages"]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"messages must be a non-empty list of turns; got {_short(value)}")
    turns: list[dict[str, str]] = []
    weights: list[float] = []
    for number, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise DataError(f"messages[{number}] must have a role and a text content; got {_short(turn)}")
        if turn.get("role") not in _ROLES:
            raise DataError(
                f"messages[{number}] has role {turn.get('role')!r}", remedy=f"roles are {', '.join(_ROLES)}"
            )
        turns.append({"role": turn["role"], "content": turn["content"]})
        weights.append(_non_negative(turn.get("weight", 1.0), f"messages[{number}].weight"))
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError("messages has no assistant turn, so there is nothing to learn")
    weight = _weight(fields)
    if isinstance(weight, list) and (len(weight) != len(turns) or isinstance(weight[0], dict)):
        raise DataError(
            f"weights of a chat must be a number or one number per message; got {_short(weight)} "
            f"for {len(turns)} messages"
        )
    has_own_weights = any("weight" in turn for turn in value)
    if weight is not None and has_own_weights:
        raise DataError("weights are given for the row and in its messages", remedy="give them in one place")
    return tuple(turns), weights if has_own_weights else weight


def _weight(fields: Fields) -> Weight | None:
    """The row's `weight` or `weights`: a number, numbers, or character spans."""
    if "weight" in fields and "weights" in fields:
        raise DataError("the row has both weight and weights", remedy="give one of them")
    value = fields.get("weight", fields.get("weights"))
    if value is None:
        return None
    if not isinstance(value, list):
        return _non_negative(value, "weight")
    if not value:
        raise DataError("weights is an empty list", remedy="leave the field out for weight 1")
    if not isinstance(value[0], Mapping):
        return [_non_negative(item, f"weights[{number}]") for number, item in enumerate(value)]
    spans = []
    for number, item in enumerate(value):
        if not isinstance(item, Mapping) or set(item) != {"start", "end", "weight"}:
            raise DataError(f"weights[{number}] must have start, end and weight; got {_short(item)}")
        span = {key: _non_negative(item[key], f"weights[{number}].{key}") for key in item}
        spans.append(span)
    return spans


def _check_spans(weight: Weight | None, num_characters: int) -> None:
    """Character spans must lie inside the text and not overlap: a character has one weight."""
    if not isinstance(weight, list) or not isinstance(weight[0], dict):
        return
    previous_end = 0.0
    for span in sorted((item for item in weight if isinstance(item, dict)), key=lambda item: item["start"]):
        if not span["start"] < span["end"] <= num_characters or not (
            span["start"].is_integer() and span["end"].is_integer()
        ):
            raise DataError(
                f"weight span {span} is not inside the text of {num_characters} characters",
                remedy="start and end count characters of prompt + completion, end is exclusive",
            )
        if span["start"] < previous_end:
            raise DataError(f"weight span {span} overlaps the span before it")
        previous_end = span["end"]


def _text(fields: Fields, field: str, *, may_be_empty: bool = False) -> str:
    value = fields[field]
    if not isinstance(value, str):
        raise DataError(f"field {field!r} must be text; got {_short(value)}")
    if not value and not may_be_empty:
        raise DataError(f"field {field!r} is empty")
    return value


def _finite(value: Any, field: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"field {field!r} must be a finite number; got {_short(value)}")
    return float(value)


def _non_negative(value: Any, field: str) -> float:
    number = _finite(value, field)
    if number < 0:
        raise DataError(f"field {field!r} must not be negative; got {number}")
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


# In the order they are tried: benchmarks have fields that custom rows may have too.
FORMATS: tuple[RowFormat, ...] = (
    RowFormat(
        "MBPP",
        (("task_id", "text", "code", "test_list"), ("task_id", "prompt", "code", "test_list")),
        _mbpp_examples,
        _mbpp_task,
        mbpp_split,
    ),
    RowFormat(
        "HumanEval",
        (("prompt", "canonical_solution", "test", "entry_point"),),
        _humaneval_examples,
        _humaneval_task,
    ),
    RowFormat("CodeContests", (("description", "solutions"),), _contest_examples, contest_task),
    RowFormat(
        "custom",
        (("messages",), ("prompt", "completion"), ("text",), ("prompt", "tests")),
        _custom_examples,
        custom_task,
    ),
)
