"""The public face of MicroCode: problems of a split, with noise on request, and their form as tasks."""

from __future__ import annotations

import random
from dataclasses import dataclass

from wmtp.evaluation.microcode.noise import choose_wrong, insert_comments
from wmtp.evaluation.microcode.problems import (
    ENTRY_POINT,
    Draft,
    Line,
    Split,
    body_lines,
    draw_draft,
    instruction_of,
    prompt_of,
    write_tests,
)
from wmtp.evaluation.tasks import Task
from wmtp.exceptions import UserInputError

STOP = ("\n#", "\ndef", "\nassert", "\nprint")
"""What ends a completion that runs on past its function; comments inside a body are indented."""


@dataclass(frozen=True, slots=True)
class MicroCodeProblem:
    """One problem with the solution that a training corpus holds for it.

    `prompt + solution` is a whole program, so a training example is the pair of them, with the prompt masked.

    Attributes:
        task_id: unique within its split and seed, such as `microcode/train/0/17`.
        instruction: what the function must do, in English.
        prompt: the instruction as a comment line and the function's signature line.
        solution: the function's body, indented, newline at its end; wrong or commented where noise says so.
        tests: one assert a line; a wrong solution fails at least one of them.
        entry_point: the function's name.
        is_wrong: whether `solution` was made wrong.
        has_comments: whether `solution` carries distracting comments.
        composition: names of the operations in order; held out as a whole, for `test` alone.
        reference: the right body without comments.
    """

    task_id: str
    instruction: str
    prompt: str
    solution: str
    tests: str
    entry_point: str
    is_wrong: bool
    has_comments: bool
    composition: tuple[str, ...]
    reference: str

    @property
    def program(self) -> str:
        """The whole program: prompt and solution."""
        return self.prompt + self.solution


def generate_problems(
    *,
    split: Split,
    num_problems: int,
    seed: int = 0,
    wrong_ratio: float = 0.0,
    comment_ratio: float = 0.0,
) -> list[MicroCodeProblem]:
    """Generate problems; the same arguments always give the same problems.

    Noise never changes what is asked or tested: problem i has the same prompt and tests at every ratio.

    Args:
        split: `train`, `validation` (same compositions, other instructions) or `test` (held-out ones).
        num_problems: how many.
        seed: another seed draws other problems of the same split.
        wrong_ratio: share of wrong solutions, 0 to 1; exactly `round(wrong_ratio * num_problems)` are wrong.
        comment_ratio: share of solutions with one or two distracting comment lines, 0 to 1; exact as well.

    Raises:
        UserInputError: an unknown split, a negative number or a ratio outside 0 to 1.
    """
    _check_arguments(split, num_problems, wrong_ratio, comment_ratio)
    # Each use has its own stream, so that a changed ratio leaves everything else as it was.
    task_rng, wrong_rng, comment_rng = (
        random.Random(f"microcode/{split}/{seed}/{use}") for use in ("tasks", "wrong", "comments")
    )
    drafts = [draw_draft(task_rng, split) for _ in range(num_problems)]
    wrong = choose_wrong(wrong_rng, drafts, wrong_ratio)
    commented = set(comment_rng.sample(range(num_problems), round(comment_ratio * num_problems)))
    problems = []
    for index, draft in enumerate(drafts):
        right = [step.right() for step in draft.steps]
        body = body_lines(draft.family, wrong.get(index, right))
        if index in commented:
            body = insert_comments(comment_rng, body)
        problems.append(
            _finish(
                draft,
                task_id=f"microcode/{split}/{seed}/{index}",
                body=body,
                right=right,
                is_wrong=index in wrong,
                has_comments=index in commented,
            )
        )
    return problems


def to_task(problem: MicroCodeProblem) -> Task:
    """Turn a problem into a task for evaluation; its reference is the right body, whatever the noise."""
    return Task(
        task_id=problem.task_id,
        prompt=problem.prompt,
        tests=problem.tests,
        program_prefix=problem.prompt,
        stop=STOP,
        reference=problem.reference,
        entry_point=problem.entry_point,
        benchmark="microcode",
    )


def _finish(
    draft: Draft, *, task_id: str, body: list[str], right: list[Line], is_wrong: bool, has_comments: bool
) -> MicroCodeProblem:
    instruction = instruction_of(draft.steps)
    return MicroCodeProblem(
        task_id=task_id,
        instruction=instruction,
        prompt=prompt_of(draft.family, instruction),
        solution="\n".join(body) + "\n",
        tests=write_tests(draft),
        entry_point=ENTRY_POINT,
        is_wrong=is_wrong,
        has_comments=has_comments,
        composition=draft.composition,
        reference="\n".join(body_lines(draft.family, right)) + "\n",
    )


def _check_arguments(split: str, num_problems: int, wrong_ratio: float, comment_ratio: float) -> None:
    if split not in ("train", "validation", "test"):
        raise UserInputError(f"MicroCode has no split {split!r}", remedy="Use train, validation or test.")
    if num_problems < 0:
        raise UserInputError(
            f"MicroCode cannot generate {num_problems} problems", remedy="Ask for none or more."
        )
    for name, ratio in (("wrong_ratio", wrong_ratio), ("comment_ratio", comment_ratio)):
        if not 0.0 <= ratio <= 1.0:
            raise UserInputError(
                f"MicroCode {name} must lie between 0 and 1, got {ratio!r}", remedy=f"Give {name} as a share."
            )
