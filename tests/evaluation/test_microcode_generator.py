"""MicroCode problems: determinism, splits, tests that tell right from wrong, noise that keeps its ratios."""

from __future__ import annotations

from typing import Any, Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.evaluation import assemble_program
from wmtp.evaluation.microcode import MicroCodeProblem, Split, generate_problems, to_task
from wmtp.evaluation.microcode.operations import OPERATIONS
from wmtp.exceptions import UserInputError

SPLITS: tuple[Literal["train", "validation", "test"], ...] = get_args(Split)


def count_failures(problem: MicroCodeProblem, body: str) -> int:
    """Execute a generator-made program, and count the asserts of its problem that fail or raise."""
    namespace: dict[str, Any] = {}
    exec(problem.prompt + body, namespace)
    failures = 0
    for line in problem.tests.splitlines():
        try:
            exec(line, namespace)
        except Exception:
            failures += 1
    return failures


def without_comments(body: str) -> str:
    return "".join(line for line in body.splitlines(keepends=True) if not line.lstrip().startswith("#"))


@pytest.mark.parametrize("split", SPLITS)
def test_same_arguments_give_the_same_problems(split: Split) -> None:
    arguments = {"split": split, "num_problems": 40, "seed": 3, "wrong_ratio": 0.4, "comment_ratio": 0.4}
    assert generate_problems(**arguments) == generate_problems(**arguments)


def test_another_seed_gives_other_problems() -> None:
    first = generate_problems(split="train", num_problems=50, seed=0)
    second = generate_problems(split="train", num_problems=50, seed=1)
    assert sum(a.instruction == b.instruction for a, b in zip(first, second, strict=True)) < 10


def test_known_problem_never_changes_from_machine_to_machine() -> None:
    problem = generate_problems(split="test", num_problems=1, seed=0)[0]
    assert problem.task_id == "microcode/test/0/0"
    assert problem.program == (
        "# take only the first 3, then add 2 to every number, then keep numbers below 5\n"
        "def f(xs):\n"
        "    xs = xs[:3]\n"
        "    xs = [x + 2 for x in xs]\n"
        "    return [x for x in xs if x < 5]\n"
    )


@settings(max_examples=15, deadline=None)
@given(train_seed=st.integers(0, 2**32), test_seed=st.integers(0, 2**32))
def test_no_composition_of_test_is_in_train_or_validation_for_any_seed(
    train_seed: int, test_seed: int
) -> None:
    held_out = {p.composition for p in generate_problems(split="test", num_problems=60, seed=test_seed)}
    for split in ("train", "validation"):
        problems = generate_problems(split=split, num_problems=100, seed=train_seed)
        assert held_out.isdisjoint(p.composition for p in problems)


@settings(max_examples=15, deadline=None)
@given(train_seed=st.integers(0, 2**32), validation_seed=st.integers(0, 2**32))
def test_no_instruction_of_validation_is_in_train_for_any_seed(train_seed: int, validation_seed: int) -> None:
    validation = generate_problems(split="validation", num_problems=60, seed=validation_seed)
    train = generate_problems(split="train", num_problems=200, seed=train_seed)
    assert {p.instruction for p in validation}.isdisjoint(p.instruction for p in train)


def test_validation_asks_for_compositions_that_train_knows() -> None:
    train = {p.composition for p in generate_problems(split="train", num_problems=3000)}
    validation = [p.composition for p in generate_problems(split="validation", num_problems=200)]
    assert sum(composition in train for composition in validation) > 150


def test_train_shows_every_operation_that_test_asks_for() -> None:
    seen = {name for p in generate_problems(split="train", num_problems=400) for name in p.composition}
    assert seen == set(OPERATIONS)


def test_held_out_compositions_are_a_fifth_to_a_seventh_of_all() -> None:
    composition_counts = [
        len({p.composition for p in generate_problems(split=split, num_problems=num)})
        for split, num in (("train", 6000), ("test", 1500))
    ]
    assert 0.13 < composition_counts[1] / sum(composition_counts) < 0.22


@pytest.mark.parametrize("split", SPLITS)
def test_right_solutions_pass_their_tests(split: Split) -> None:
    for problem in generate_problems(split=split, num_problems=150, comment_ratio=0.5):
        assert not problem.is_wrong
        assert count_failures(problem, problem.solution) == 0


@pytest.mark.parametrize("wrong_ratio", [0.3, 1.0])
def test_wrong_solutions_fail_at_least_one_test_and_their_reference_passes(wrong_ratio: float) -> None:
    problems = generate_problems(
        split="train", num_problems=300, seed=5, wrong_ratio=wrong_ratio, comment_ratio=0.5
    )
    for problem in problems:
        assert (count_failures(problem, problem.solution) > 0) == problem.is_wrong
        assert count_failures(problem, problem.reference) == 0


def test_leaving_out_any_step_but_the_last_fails_a_test() -> None:
    for problem in generate_problems(split="train", num_problems=150, seed=2):
        lines = problem.solution.splitlines(keepends=True)
        for index in range(len(lines) - 1):
            assert count_failures(problem, "".join(lines[:index] + lines[index + 1 :])) > 0


def test_a_program_that_returns_a_constant_fails_a_test() -> None:
    for problem in generate_problems(split="test", num_problems=100):
        first_result = problem.tests.splitlines()[0].split(" == ")[1]
        assert count_failures(problem, f"    return {first_result}\n") > 0


@settings(max_examples=25, deadline=None)
@given(
    num_problems=st.integers(0, 120),
    seed=st.integers(0, 1000),
    wrong_ratio=st.floats(0, 1),
    comment_ratio=st.floats(0, 1),
)
def test_noise_keeps_its_ratios_and_leaves_prompt_and_tests_alone(
    num_problems: int, seed: int, wrong_ratio: float, comment_ratio: float
) -> None:
    clean = generate_problems(split="train", num_problems=num_problems, seed=seed)
    noisy = generate_problems(
        split="train",
        num_problems=num_problems,
        seed=seed,
        wrong_ratio=wrong_ratio,
        comment_ratio=comment_ratio,
    )
    assert len(noisy) == num_problems
    assert sum(p.is_wrong for p in noisy) == round(wrong_ratio * num_problems)
    assert sum(p.has_comments for p in noisy) == round(comment_ratio * num_problems)
    for before, after in zip(clean, noisy, strict=True):
        assert (after.prompt, after.tests, after.reference) == (before.prompt, before.tests, before.solution)
        assert after.has_comments == ("#" in after.solution)
        assert after.is_wrong == (without_comments(after.solution) != before.solution)


def test_right_and_wrong_solutions_are_commented_alike() -> None:
    problems = generate_problems(split="train", num_problems=3000, wrong_ratio=0.5, comment_ratio=0.5)
    shares = [
        sum(p.has_comments for p in problems if p.is_wrong is is_wrong) / 1500 for is_wrong in (True, False)
    ]
    assert abs(shares[0] - shares[1]) < 0.08


def test_pitfalls_are_got_wrong_more_often_than_right_and_everything_else_seldom() -> None:
    problems = generate_problems(split="train", num_problems=4000, wrong_ratio=0.3)
    pitfalls = {name for name, operation in OPERATIONS.items() if operation.is_pitfall}
    with_pitfall = [p for p in problems if pitfalls & set(p.composition)]
    others = [p for p in problems if not pitfalls & set(p.composition)]
    assert 0.5 < sum(p.is_wrong for p in with_pitfall) / len(with_pitfall) < 0.7
    assert 0.02 < sum(p.is_wrong for p in others) / len(others) < 0.2


def test_comment_lines_hardly_ever_repeat() -> None:
    problems = generate_problems(split="train", num_problems=500, comment_ratio=1.0)
    comments = [line for p in problems for line in p.solution.splitlines() if line.lstrip().startswith("#")]
    assert len(comments) >= 500
    assert len(set(comments)) == len(comments)


def test_task_judges_the_reference_right_and_cuts_what_runs_on() -> None:
    problem = generate_problems(split="test", num_problems=1, seed=9)[0]
    task = to_task(problem)
    assert (task.task_id, task.prompt, task.tests) == (problem.task_id, problem.prompt, problem.tests)
    program = assemble_program(task, task.reference + "\ndef g(xs):\n    return 1 / 0\n")
    assert program == problem.prompt + problem.reference
    namespace: dict[str, Any] = {}
    exec(program, namespace)
    exec(task.tests, namespace)


def test_task_ids_are_unique() -> None:
    problems = [
        p
        for split in SPLITS
        for seed in (0, 1)
        for p in generate_problems(split=split, num_problems=30, seed=seed)
    ]
    assert len({p.task_id for p in problems}) == len(problems)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": "dev"}, "dev"),
        ({"num_problems": -1}, "-1"),
        ({"wrong_ratio": 1.5}, "1.5"),
        ({"comment_ratio": -0.1}, "-0.1"),
        ({"wrong_ratio": float("nan")}, "nan"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserInputError, match=named):
        generate_problems(**{"split": "train", "num_problems": 3, **arguments})
