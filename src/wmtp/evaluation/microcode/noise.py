"""What noisy corpora do to right programs: systematic mistakes, and comments that have nothing to do with it.

Most mistakes are slips at pitfalls: a few operations that the corpus gets wrong about as often as right,
always in the same way, as people do with bounds and slices. A model trained on everything learns the slip
together with the operation. More data of the same kind does not cure that; knowing whom to trust does.
The other mistakes are spread over all operations: slips elsewhere, constants off by one, the wrong operation,
steps swapped or left out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from wmtp.evaluation.microcode.operations import REDUCERS, TRANSFORMS
from wmtp.evaluation.microcode.problems import Draft, Line, fails

_PITFALL_SHARE = 0.9
_COMMENT_VERBS = ("ask", "see", "todo", "note", "from", "check", "fixme", "old")
_COMMENT_WORDS = (
    *("apple", "river", "stone", "cloud", "amber", "tiger", "paper", "north", "silver", "maple", "ocean"),
    *("tower", "violet", "copper", "harbor", "lemon", "garden", "winter", "rocket", "puzzle", "velvet"),
    *("orbit", "meadow", "falcon", "ginger", "marble", "pepper", "canyon", "thunder", "island"),
)


def choose_wrong(rng: random.Random, drafts: Sequence[Draft], wrong_ratio: float) -> dict[int, list[Line]]:
    """Choose exactly `round(wrong_ratio * len(drafts))` problems and write a wrong program for each.

    Problems with a pitfall are taken first, up to their share of the mistakes; the rest from all others.
    """
    num_wrong = round(wrong_ratio * len(drafts))
    order = rng.sample(range(len(drafts)), len(drafts))
    with_pitfall = [i for i in order if any(step.operation.is_pitfall for step in drafts[i].steps)]
    at_pitfall = with_pitfall[: round(_PITFALL_SHARE * num_wrong)]
    taken = set(at_pitfall)
    elsewhere = [i for i in order if i not in taken][: num_wrong - len(at_pitfall)]
    wrong = {i: slip_at_pitfall(drafts[i]) for i in at_pitfall}
    wrong.update({i: draw_mistake(rng, drafts[i]) for i in elsewhere})
    return wrong


def slip_at_pitfall(draft: Draft) -> list[Line]:
    """Write a program that slips at every pitfall of a problem."""
    lines = [step.slip() if step.operation.is_pitfall else step.right() for step in draft.steps]
    return lines if fails(draft, lines) else _slip_at_first_pitfall(draft)


def draw_mistake(rng: random.Random, draft: Draft) -> list[Line]:
    """Write a wrong program with a mistake of a random kind at a random step; it fails at least one test."""
    mistakes = [_slip, _shift_constant, _replace_operation, _swap_steps, _leave_out_step]
    while True:
        lines = [step.right() for step in draft.steps]
        rng.choices(mistakes, (5, 2, 2, 1, 1))[0](rng, draft, lines)
        # Some mistakes change nothing: two maps swapped, or a step that cannot be left out.
        if fails(draft, lines):
            return lines


def draw_comment(rng: random.Random) -> str:
    """Write a comment line that no instruction can predict."""
    words = " ".join(rng.choices(_COMMENT_WORDS, k=rng.randint(3, 5)))
    return f"    # {rng.choice(_COMMENT_VERBS)} {words} {rng.randint(100, 9999)}"


def insert_comments(rng: random.Random, lines: Sequence[str]) -> list[str]:
    """Return a body's lines with one or two comment lines at random places among them."""
    body = list(lines)
    for _ in range(rng.randint(1, 2)):
        body.insert(rng.randrange(len(body)), draw_comment(rng))
    return body


def _slip_at_first_pitfall(draft: Draft) -> list[Line]:
    # Two slips can undo each other; a single one never passes, by the way problems are drawn.
    first = next(i for i, step in enumerate(draft.steps) if step.operation.is_pitfall)
    return [step.slip() if i == first else step.right() for i, step in enumerate(draft.steps)]


def _slip(rng: random.Random, draft: Draft, lines: list[Line]) -> None:
    index = rng.randrange(len(lines))
    lines[index] = draft.steps[index].slip()


def _shift_constant(rng: random.Random, draft: Draft, lines: list[Line]) -> None:
    index = rng.randrange(len(lines))
    constant = lines[index].constant
    if constant is not None:
        lines[index] = replace(lines[index], constant=constant + rng.choice((-1, 1)))


def _replace_operation(rng: random.Random, draft: Draft, lines: list[Line]) -> None:
    index = rng.randrange(len(lines))
    is_reducer = draft.steps[index].operation.is_reducer
    operation = rng.choice((REDUCERS if is_reducer else TRANSFORMS)[draft.family])
    constant = rng.choice(operation.constants) if operation.constants else None
    lines[index] = Line(operation.expression, operation.apply, constant)


def _swap_steps(rng: random.Random, draft: Draft, lines: list[Line]) -> None:
    num_movable = len(lines) - draft.steps[-1].operation.is_reducer
    if num_movable > 1:
        index = rng.randrange(num_movable - 1)
        lines[index], lines[index + 1] = lines[index + 1], lines[index]


def _leave_out_step(rng: random.Random, draft: Draft, lines: list[Line]) -> None:
    if len(lines) > 1:
        del lines[rng.randrange(len(lines))]
