"""The primitive operations MicroCode programs are made of.

An `Operation` knows three things about one step: how English says it, how Python writes it, and what it does,
as a plain callable. Expected results are always computed by the callable, never by executing program text.
Beside the right way each operation carries its `slip`: the mistake people typically make with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Value = int | str | list[int]
"""What flows between the steps of a program: integers or a text, and one integer after a reduction."""

Family = Literal["ints", "text"]
"""The kind of argument a program takes: `xs`, a list of integers, or `s`, a text."""

Semantics = Callable[..., Value]
"""`(value, constant) -> value`, pure: the argument is never changed."""

VARIABLE: dict[Family, str] = {"ints": "xs", "text": "s"}
"""The name of the program's argument, which its steps assign to again."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One step: its English, its Python, its meaning, and the typical mistake.

    Args:
        name: identifies the operation; compositions, and with them the held-out split, are tuples of names.
        family: what the step takes.
        phrases: ways to say it; `{k}` stands for the constant.
        expression: the Python expression; `{k}` stands for the constant.
        apply: the meaning of `expression`.
        slip_expression: what the typical mistake writes instead.
        slip_apply: the meaning of `slip_expression`.
        constants: the values `{k}` may take, empty when the step has no constant.
        is_reducer: whether the step ends a program with an integer.
        is_pitfall: whether noisy corpora get this step wrong about as often as right.
    """

    name: str
    family: Family
    phrases: tuple[str, ...]
    expression: str
    apply: Semantics
    slip_expression: str
    slip_apply: Semantics
    constants: tuple[int, ...] = ()
    is_reducer: bool = False
    is_pitfall: bool = False


_SMALL = (2, 3, 4)
_DIGITS = (2, 3, 4, 5, 6, 7, 8, 9)

_INTEGER_OPERATIONS = (
    Operation(
        "keep_even", "ints", ("keep the even numbers", "keep only even numbers"),
        "[x for x in xs if x % 2 == 0]", lambda v, k: [x for x in v if x % 2 == 0],
        "[x for x in xs if x % 2 == 1]", lambda v, k: [x for x in v if x % 2 == 1],
    ),
    Operation(
        "keep_odd", "ints", ("keep the odd numbers", "keep only odd numbers"),
        "[x for x in xs if x % 2 == 1]", lambda v, k: [x for x in v if x % 2 == 1],
        "[x for x in xs if x % 2 == 0]", lambda v, k: [x for x in v if x % 2 == 0],
    ),
    Operation(
        "keep_above", "ints", ("keep numbers above {k}", "keep what is above {k}"),
        "[x for x in xs if x > {k}]", lambda v, k: [x for x in v if x > k],
        "[x for x in xs if x > {k} - 1]", lambda v, k: [x for x in v if x > k - 1],
        constants=_DIGITS, is_pitfall=True,
    ),
    Operation(
        "keep_below", "ints", ("keep numbers below {k}", "keep what is below {k}"),
        "[x for x in xs if x < {k}]", lambda v, k: [x for x in v if x < k],
        "[x for x in xs if x < {k} - 1]", lambda v, k: [x for x in v if x < k - 1],
        constants=_DIGITS, is_pitfall=True,
    ),
    Operation(
        "add", "ints", ("add {k} to each", "add {k} to every number"),
        "[x + {k} for x in xs]", lambda v, k: [x + k for x in v],
        "[x - {k} for x in xs]", lambda v, k: [x - k for x in v],
        constants=_DIGITS,
    ),
    Operation(
        "subtract", "ints", ("subtract {k} from each", "subtract {k} from every number"),
        "[x - {k} for x in xs]", lambda v, k: [x - k for x in v],
        "[x + {k} for x in xs]", lambda v, k: [x + k for x in v],
        constants=_DIGITS,
    ),
    Operation(
        "multiply", "ints", ("multiply each by {k}", "multiply every number by {k}"),
        "[x * {k} for x in xs]", lambda v, k: [x * k for x in v],
        "[x + {k} for x in xs]", lambda v, k: [x + k for x in v],
        constants=_DIGITS,
    ),
    Operation(
        "square", "ints", ("square each", "square every number"),
        "[x * x for x in xs]", lambda v, k: [x * x for x in v],
        "[x + x for x in xs]", lambda v, k: [x + x for x in v],
    ),
    Operation(
        "negate", "ints", ("negate each", "negate every number"),
        "[-x for x in xs]", lambda v, k: [-x for x in v],
        "[abs(x) for x in xs]", lambda v, k: [abs(x) for x in v],
    ),
    Operation(
        "sort", "ints", ("sort them", "sort in rising order"),
        "sorted(xs)", lambda v, k: sorted(v),
        "sorted(xs)[::-1]", lambda v, k: sorted(v)[::-1],
    ),
    Operation(
        "reverse", "ints", ("reverse them", "reverse the order"),
        "xs[::-1]", lambda v, k: v[::-1],
        "xs[::2]", lambda v, k: v[::2],
    ),
    Operation(
        "take", "ints", ("take the first {k}", "take only the first {k}"),
        "xs[:{k}]", lambda v, k: v[:k],
        "xs[:{k} - 1]", lambda v, k: v[: k - 1],
        constants=_SMALL, is_pitfall=True,
    ),
    Operation(
        "drop", "ints", ("drop the first {k}", "leave out the first {k}"),
        "xs[{k}:]", lambda v, k: v[k:],
        "xs[-{k}:]", lambda v, k: v[-k:],
        constants=_SMALL,
    ),
    Operation(
        "sum", "ints", ("return the sum", "give the sum"),
        "sum(xs)", lambda v, k: sum(v),
        "len(xs)", lambda v, k: len(v),
        is_reducer=True,
    ),
    Operation(
        "count", "ints", ("return the count", "give the count"),
        "len(xs)", lambda v, k: len(v),
        "sum(xs)", lambda v, k: sum(v),
        is_reducer=True,
    ),
    Operation(
        "largest", "ints", ("return the largest", "give the largest"),
        "max(xs, default=0)", lambda v, k: max(v, default=0),
        "min(xs, default=0)", lambda v, k: min(v, default=0),
        is_reducer=True,
    ),
    Operation(
        "smallest", "ints", ("return the smallest", "give the smallest"),
        "min(xs, default=0)", lambda v, k: min(v, default=0),
        "max(xs, default=0)", lambda v, k: max(v, default=0),
        is_reducer=True,
    ),
)  # fmt: skip

_TEXT_OPERATIONS = (
    Operation(
        "upper", "text", ("make it upper case", "turn to upper case"),
        "s.upper()", lambda v, k: v.upper(),
        "s.title()", lambda v, k: v.title(),
    ),
    Operation(
        "reverse_text", "text", ("reverse it", "reverse the text"),
        "s[::-1]", lambda v, k: v[::-1],
        "s[::2]", lambda v, k: v[::2],
    ),
    Operation(
        "take_text", "text", ("take the first {k} letters", "take only the first {k} letters"),
        "s[:{k}]", lambda v, k: v[:k],
        "s[:{k} - 1]", lambda v, k: v[: k - 1],
        constants=_SMALL, is_pitfall=True,
    ),
    Operation(
        "drop_text", "text", ("drop the first {k} letters", "leave out the first {k} letters"),
        "s[{k}:]", lambda v, k: v[k:],
        "s[-{k}:]", lambda v, k: v[-k:],
        constants=_SMALL,
    ),
    Operation(
        "repeat_text", "text", ("repeat it {k} times", "repeat the text {k} times"),
        "s * {k}", lambda v, k: v * k,
        "s + s", lambda v, k: v + v,
        constants=(3, 4, 5),
    ),
    Operation(
        "swap_case", "text", ("swap the case", "swap upper and lower case"),
        "s.swapcase()", lambda v, k: v.swapcase(),
        "s.lower()", lambda v, k: v.lower(),
    ),
    Operation(
        "length", "text", ("return the length", "give the length"),
        "len(s)", lambda v, k: len(v),
        "len(s.split())", lambda v, k: len(v.split()),
        is_reducer=True,
    ),
)  # fmt: skip

OPERATIONS: dict[str, Operation] = {
    operation.name: operation for operation in (*_INTEGER_OPERATIONS, *_TEXT_OPERATIONS)
}
"""Every operation by name, in a fixed order."""

TRANSFORMS: dict[Family, tuple[Operation, ...]] = {
    "ints": tuple(op for op in _INTEGER_OPERATIONS if not op.is_reducer),
    "text": tuple(op for op in _TEXT_OPERATIONS if not op.is_reducer),
}
"""Operations that may stand anywhere in a program: their result is of the kind they take."""

REDUCERS: dict[Family, tuple[Operation, ...]] = {
    "ints": tuple(op for op in _INTEGER_OPERATIONS if op.is_reducer),
    "text": tuple(op for op in _TEXT_OPERATIONS if op.is_reducer),
}
"""Operations that may stand only at the end of a program."""


def bind(template: str, constant: int | None) -> str:
    """Put a constant into a phrase or an expression."""
    return template if constant is None else template.replace("{k}", str(constant))
