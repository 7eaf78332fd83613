"""From what models write to programs: outputs as they really look, of every kind of prompt."""

from __future__ import annotations

import time

import pytest

from wmtp.evaluation import Task, assemble_program
from wmtp.evaluation.contests import CONTEST_STOP
from wmtp.evaluation.mbpp import MBPP_FEW_SHOT_STOP, MBPP_STOP
from wmtp.evaluation.microcode.generator import STOP as MICROCODE_STOP
from wmtp.evaluation.programs import is_python
from wmtp.evaluation.tasks import HUMANEVAL_STOP

PROGRAM = "def double(x):\n    return 2 * x\n"
PREFIX = 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """Sum of the numbers."""\n'
BODY = "    result = 0\n    for number in numbers:\n        result += number\n    return result\n"


def mbpp() -> Task:
    return Task("t", "", "assert double(2) == 4\n", stop=MBPP_STOP, form="program")


def few_shot() -> Task:
    return Task("t", "", "assert double(2) == 4\n", stop=MBPP_FEW_SHOT_STOP, form="program")


def humaneval() -> Task:
    return Task(
        "t",
        PREFIX,
        "assert total([1, 2]) == 3\n",
        program_prefix=PREFIX,
        stop=HUMANEVAL_STOP,
        entry_point="total",
    )


def contest() -> Task:
    return Task("t", "", "", cases=(("1\n", "2\n"),), stop=CONTEST_STOP, form="program")


def defines(program: str, name: str) -> object:
    """What a program of these tests (written here, harmless) defines."""
    names: dict[str, object] = {}
    exec(program, names)
    return names[name]


# What a model wrote after a zero-shot MBPP prompt; each must become exactly PROGRAM, up to blank ends.
WHOLE_PROGRAMS = {
    "plain": PROGRAM,
    "no newline at the end": PROGRAM.rstrip(),
    "windows line ends": PROGRAM.replace("\n", "\r\n"),
    "asserts repeated": PROGRAM + "\nassert double(2) == 4\nassert double(3) == 6\n",
    "a printed example": PROGRAM + "\nprint(double(21))\n",
    "the next task": PROGRAM + '\n\n"""\nWrite a function to halve a number.\nassert halve(4) == 2\n"""\n',
    "a main block": PROGRAM + '\nif __name__ == "__main__":\n    double(2)\n',
    "done marker on a line": PROGRAM + "[DONE]\n\nYou are an expert",
    "done marker in the line": PROGRAM.rstrip() + " [DONE]",
    "begin and done": "[BEGIN]\n" + PROGRAM + "[DONE]",
    "prose, begin and done": "Sure.\n[BEGIN]\n" + PROGRAM + "[DONE]\nDone!",
    "a fence after it": PROGRAM + "```\nThis doubles the number.",
    "a fence around it": f"```python\n{PROGRAM}```",
    "a fence without a language": f"```\n{PROGRAM}```\n",
    "a fence named py": f"```py\n{PROGRAM}```\n",
    "a fence in capitals": f"```Python\n{PROGRAM}```\n",
    "tildes": f"~~~python\n{PROGRAM}~~~\n",
    "a fence that is not closed": f"```python\n{PROGRAM}",
    "prose before a fence": f"Here is the function:\n\n```python\n{PROGRAM}```\n\nIt works because",
    "prose without a blank line": f"Here you go:\n```python\n{PROGRAM}```",
    "shell block first": f"Install first:\n```bash\npip install x\n```\nThen:\n```python\n{PROGRAM}```\n",
    "two blocks": f"```python\n{PROGRAM}```\nUsage:\n```python\nprint(double(2))\n```\n",
    "an empty block first": f"```python\n```\n```python\n{PROGRAM}```\n",
    "asserts inside the fence": f"```python\n{PROGRAM}\nassert double(2) == 4\n```",
    "explanation after it": PROGRAM + "\nThis function takes a number and doubles it.\n",
    "explanation in markdown": PROGRAM + "\n**Explanation:** it doubles.\n\n- simple\n- fast\n",
    "an interactive session after it": PROGRAM + "\n>>> double(2)\n4\n",
    "cut in the middle of a second function": PROGRAM + "\ndef triple(x):\n    return (x +",
    "an indented fence": f"  ```python\n{PROGRAM}  ```\n",
    "special tokens as text after it": PROGRAM + "\n<|endoftext|>import os\n",
}


@pytest.mark.parametrize("text", WHOLE_PROGRAMS.values(), ids=WHOLE_PROGRAMS.keys())
@pytest.mark.parametrize("task", [mbpp(), few_shot()], ids=["zero-shot", "three-shot"])
def test_whole_programs_are_cut_out_of_what_models_write(text: str, task: Task) -> None:
    program = assemble_program(task, text)
    if task.stop == MBPP_FEW_SHOT_STOP and "print(double(21))" in text:
        # After [BEGIN] a program may print; nothing of the kind follows the marker's end.
        assert program.startswith(PROGRAM)
    elif '"""\nWrite' in text and task.stop == MBPP_FEW_SHOT_STOP:
        assert program.startswith(PROGRAM)
    else:
        assert program.strip("\n").strip() == PROGRAM.strip("\n")
    assert callable(defines(program, "double"))


# What stays whole: programs that have what looks like an end.
KEPT = {
    "helper and constant": "TWO = 2\n\ndef f(x):\n    return x\n\ndef double(x):\n    return f(TWO * x)\n",
    "imports after a comment": "# doubles\nimport math\nfrom typing import List\n" + PROGRAM,
    "a class": "class A:\n    def __init__(self, x):\n        self.x = x\n\ndouble = lambda x: A(x).x + x\n",
    "decorator": "import functools\n@functools.lru_cache(None)\ndef double(x):\n    return 2 * x\n",
    "fence inside a string": 'def double(x):\n    text = """\n```\n    """\n    return 2 * x\n',
    "prints inside": "def double(x):\n    print(x)\n    return 2 * x\n",
    "assert inside": "def double(x):\n    assert x is not None\n    return 2 * x\n",
    "docstring": 'def double(x):\n    """\n    Doubles.\n    """\n    return 2 * x\n',
    "lambda": "double = lambda x: 2 * x\n",
    "tabs": "def double(x):\n\treturn 2 * x\n",
    "code after the function that it needs": "def double(x):\n    return FACTOR * x\nFACTOR = 2\n",
}


@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT.keys())
def test_right_programs_stay_as_they_are(text: str) -> None:
    assert assemble_program(mbpp(), text) == text
    assert defines(assemble_program(mbpp(), text), "double")(4) == 8  # type: ignore[operator]


# What a model wrote after a HumanEval prompt; the program must sum.
COMPLETIONS = {
    "plain": BODY,
    "the next function": BODY + "\n\ndef other():\n    pass\n",
    "a test": BODY + "\n\nif total([1]) == 1:\n    print('ok')\n",
    "a comment": BODY + "\n# Test\ntotal([1])\n",
    "a class": BODY + "\nclass A:\n    pass\n",
    "prose after it": BODY + "\nThe function adds up all numbers.\n",
    "a decorated function, cut": BODY + "\n@other\n",
    "asserts that hold": BODY + "\nassert total([1]) == 1\n",
    "a fence after it": BODY + "```\n\nExplanation",
    "a fence around the body": "```python\n" + BODY + "```\n",
    "the whole function again": "def total(numbers: List[int]) -> int:\n" + BODY,
    "the whole function again in a fence": f"```python\ndef total(numbers: List[int]) -> int:\n{BODY}```\n",
    "the whole function with its imports": f"```python\nimport math\ndef total(numbers):\n{BODY}```",
    "the whole function with a helper after it": "```python\nimport math\n\n\ndef total(numbers):\n"
    "    return _add(numbers)\n\n\ndef _add(numbers):\n    return sum(numbers)\n\n\nprint(total([1]))\n```\n",
    "prose and the whole function": f"Here it is:\n```python\ndef total(numbers):\n{BODY}```\nDone.",
    "one line": "    return sum(numbers)\n",
    "one line without its end": "    return sum(numbers)",
    "nested function": "    def add(a, b):\n        return a + b\n\n    out = 0\n    for n in numbers:\n"
    "        out = add(out, n)\n    return out\n",
    "a blank line first": "\n" + BODY,
    "another docstring": '    """Really."""\n' + BODY,
}


@pytest.mark.parametrize("text", COMPLETIONS.values(), ids=COMPLETIONS.keys())
def test_completions_of_a_function_become_programs_that_run(text: str) -> None:
    program = assemble_program(humaneval(), text)
    assert program.startswith(PREFIX.rstrip())
    assert defines(program, "total")([1, 2, 3]) == 6  # type: ignore[operator]


BROKEN = ["", "   ", "I cannot do that.", "    return sum(numbers", "\x00", "```", "```python"]


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_program_stays_broken_and_is_not_repaired(text: str) -> None:
    program = assemble_program(humaneval(), text)
    # Its docstring alone makes the prompt a function; one that returns nothing.
    if is_python(program):
        assert defines(program, "total")([1, 2, 3]) is None  # type: ignore[operator]
    assert not is_python(assemble_program(mbpp(), text))


@pytest.mark.parametrize(
    "text",
    [
        "n = int(input())\nprint(n + 1)\n",
        'n = int(input())\nprint(n + 1)\n\n"""\nThe next problem.\n"""\n',
        "```python\nn = int(input())\nprint(n + 1)\n```\n",
        "Read a number:\n\n```python\nn = int(input())\nprint(n + 1)\n```\nComplexity: O(1)\n",
        "n = int(input())\nprint(n + 1)\n\nTime complexity is O(1).\n",
    ],
)
def test_contest_programs_keep_their_printing(text: str) -> None:
    assert assemble_program(contest(), text).strip() == "n = int(input())\nprint(n + 1)"


def test_a_microcode_completion_may_not_begin_a_second_function() -> None:
    prefix = "# double every number\ndef f(xs):\n"
    task = Task("t", prefix, "", program_prefix=prefix, stop=MICROCODE_STOP, entry_point="f")
    body = "    return [2 * x for x in xs]\n"
    assert assemble_program(task, body) == prefix + body
    assert assemble_program(task, body + "\n# next\ndef f(xs):\n").rstrip() == (prefix + body).rstrip()
    program = assemble_program(task, f"```python\ndef f(xs):\n{body}```")
    assert defines(program, "f")([1]) == [2]  # type: ignore[operator]


def test_texts_are_cut_at_stop_strings_and_nothing_else() -> None:
    task = Task("t", "Q: 1+1?", "", form="text", stop=("\nQ:",), reference="2")
    assert assemble_program(task, "2\nQ: 2+2?") == "2"
    assert assemble_program(task, "```\n2 [DONE]\n") == "```\n2 [DONE]\n"


@pytest.mark.parametrize(
    "text",
    [
        "(" * 60_000,
        "x = " + "-" * 40_000 + "1",
        "a" * 200_000,
        "(\n" * 20_000,
        "x y\n" * 10_000,
        "```\n" * 10_000,
    ],
)
def test_hostile_texts_are_cut_in_bounded_time(text: str) -> None:
    began = time.process_time()
    assemble_program(mbpp(), PROGRAM + text)
    assert time.process_time() - began < 5.0
