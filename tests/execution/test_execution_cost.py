"""What the sandbox costs beside bare Python. The benchmark has the numbers; this keeps the bound."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from wmtp.execution import run_program

PROGRAM = "def add(a, b): return a + b\n"
TESTS = "assert add(1, 2) == 3"
BARE = [str(Path(sys.executable).resolve()), "-I", "-S", "-B", "-c", PROGRAM + TESTS]


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@pytest.mark.slow
def test_a_program_costs_at_most_fifty_milliseconds_over_bare_python() -> None:
    run_program(PROGRAM, tests=TESTS)  # starts the worker
    rounds = [
        (
            seconds(lambda: subprocess.run(BARE, check=True)),
            seconds(lambda: run_program(PROGRAM, tests=TESTS)),
        )
        for _ in range(40)
    ]
    bare, sandboxed = (statistics.median(times) for times in zip(*rounds, strict=True))
    assert sandboxed - bare < 0.05
