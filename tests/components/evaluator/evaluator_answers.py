"""What the model of these tests has learnt, and tasks about it."""

from __future__ import annotations

from typing import Any

from wmtp.evaluation import Task

TESTS = "assert f(3) == 6\nassert f(0) == 0\n"
ANSWERS = {
    "right": "def f(x):\n    return 2 * x\n",
    "wrong": "def f(x):\n    return x\n",
    "broken": "def f(x) return\n",
    "endless": "def f(x):\n    while True: pass\n",
    "fenced": "```python\ndef f(x):\n    return 2 * x\n```\n",
}
EXPECTED_STATUS = {"right": "passed", "wrong": "failed", "broken": "error", "endless": "timeout"}


def task(name: str, **changes: Any) -> Task:
    return Task(**{"task_id": name, "prompt": f"{name}:\n", "tests": TESTS, **changes})
