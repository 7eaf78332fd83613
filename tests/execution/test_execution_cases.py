"""Programs judged by what they print: pairs of input and expected output, as in programming contests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp.exceptions import UserInputError
from wmtp.execution import ProgramJob, outputs_match, run_program, run_programs
from wmtp.execution.pool import _Pool

SUM = "print(sum(map(int, input().split())))"
CASES = [("1 2\n", "3\n"), ("5 6\n", "11"), ("-1 1\n", " 0 \n\n")]


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ("1 2\n3", "1\n2\r\n\t3\v"),
        ("", " \n"),
        ("YES", "yes"),
        ("3.0000001", "3"),
        ("0.33333", "0.333331"),
        ("-0", "0"),
        ("007", "7"),
        ("+5", "5"),
        ("1e3", "1000"),
        (".5", "0.5"),
        ("nan inf", "NaN Inf"),
        ("1_0", "1_0"),
        ("9" * 30, "9" * 30),
        ("héllo", "héllo"),
    ],
)
def test_outputs_that_match(actual: str, expected: str) -> None:
    assert outputs_match(actual, expected)
    assert outputs_match(expected, actual)
    assert outputs_match(actual.encode(), expected)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ("12", "1 2"),
        ("1", "1 1"),
        ("", "0"),
        ("3.0001", "3"),
        ("nan", "1"),
        ("inf", "1e999"),
        ("1_0", "10"),
        ("0x10", "16"),
        ("\u0664", "4"),
        ("É", "é"),
        ("1\f2", "1 2"),
        ("100000000000000001", "100000000000000000"),
        ("1" + "0" * 500, "1" + "0" * 499),
        ("1,000", "1000"),
        ("no", "yes"),
    ],
)
def test_outputs_that_do_not_match(actual: str, expected: str) -> None:
    assert not outputs_match(actual, expected)
    assert not outputs_match(expected, actual)


@given(st.lists(st.text("abcXYZ019.-+e", min_size=1, max_size=6)), st.data())
def test_whitespace_and_case_never_matter(tokens: list[str], data: st.DataObject) -> None:
    blanks = st.text(" \n\t\r\v", min_size=1, max_size=3)
    one, two = ("".join(data.draw(blanks) + token for token in tokens) for _ in range(2))
    assert outputs_match(one, two.swapcase())
    assert not outputs_match(one, f"{two} more")


def naive_match(actual: str, expected: str) -> bool:
    """The published rule, written down again: lower-case tokens, equal or two numbers at most 1e-5 apart."""

    def tokens(text: str) -> list[str]:
        for blank in "\n\t\r\v":
            text = text.replace(blank, " ")
        return [token.lower() for token in text.split(" ") if token]

    def values_match(one: str, two: str) -> bool:
        try:
            return one == two or abs(float(one) - float(two)) < 1e-5
        except ValueError:
            return False

    ones, twos = tokens(actual), tokens(expected)
    return len(ones) == len(twos) and all(map(values_match, ones, twos))


numbers = (
    st.integers(-9, 9).map(str)
    | st.floats(-9, 9).map(str)
    | st.sampled_from(["a", "A", "1.00001", "1.000009"])
)


@given(st.lists(numbers, max_size=3), st.lists(numbers, max_size=3))
def test_the_rule_is_the_published_one(ones: list[str], twos: list[str]) -> None:
    assert outputs_match(" ".join(ones), "\n".join(twos)) == naive_match(" ".join(ones), "\n".join(twos))


def test_a_program_passes_by_printing_what_is_expected_for_every_input(pool: _Pool) -> None:
    result = pool.run(ProgramJob(source=SUM, cases=CASES))
    assert (result.passed, result.status, result.message) == (True, "passed", "")
    assert (result.asserts_passed, result.asserts_total) == (3, 3)
    assert result.stdout == "0\n"


def test_the_run_ends_at_the_first_pair_that_fails() -> None:
    wrong = SUM + "\nimport sys\nprint('ran', file=sys.stderr)"
    cases = [CASES[0], ("1 1\n", "3\n"), CASES[1]]
    result = run_program(wrong, cases=cases)
    assert (result.passed, result.status) == (False, "failed")
    assert result.message == "case 2 of 3: expected '3\\n', printed '2\\n'"
    assert (result.asserts_passed, result.asserts_total, result.stdout) == (1, 3, "2\n")
    counted = run_program(wrong, cases=cases, stop_at_failure=False)
    assert (counted.status, counted.asserts_passed, counted.asserts_total) == ("failed", 2, 3)
    assert counted.message == result.message


@pytest.mark.parametrize(
    ("source", "status", "word"),
    [
        ("print(3)\n1/0", "error", "ZeroDivisionError"),
        ("print(3)\nexit(1)", "error", "exit status 1"),
        ("print(3", "error", "SyntaxError"),
        ("input(); input()", "error", "EOFError"),
        ("print(3, flush=True)\nwhile True: pass", "timeout", "time limit"),
        ("x = bytearray(1 << 30)\nprint(3)", "memory", "MemoryError"),
        (
            "import os, signal\nprint(3, flush=True)\nos.kill(os.getpid(), signal.SIGTERM)",
            "killed",
            "SIGTERM",
        ),
        ("raise AssertionError", "failed", "AssertionError"),
    ],
)
def test_a_program_that_does_not_end_well_says_how(source: str, status: str, word: str) -> None:
    result = run_program(source, cases=[("1 2\n", "3\n")], timeout_s=1.0)
    assert (result.passed, result.status) == (False, status)
    assert "case 1 of 1" in result.message
    assert word in result.message


@pytest.mark.parametrize(
    "ending", ["exit()", "quit()", "import sys; sys.exit()", "raise SystemExit", "exit(0)"]
)
def test_programs_may_end_themselves_once_they_have_printed(ending: str) -> None:
    assert run_program(f"{SUM}\n{ending}", cases=CASES).passed


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
        "import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))",
        "import os\nos.write(1, b'%d' % sum(map(int, os.read(0, 99).split())))",
        "print(sum(map(int, open(0).read().split())))",
        "import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.readline().split())))",
        "import threading, sys\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
        f"def main(): {SUM}\nt = threading.Thread(target=main); t.start(); t.join()",
        f"def main():\n    {SUM}\nif __name__ == '__main__':\n    main()",
    ],
)
def test_the_ways_to_read_and_write_of_contests_work(source: str) -> None:
    result = run_program(source, cases=CASES)
    assert result.passed, result.message


def test_limits_are_those_of_each_run() -> None:
    slow = "import time\ntime.sleep(0.4)\n" + SUM
    assert run_program(slow, cases=CASES, timeout_s=1.0).passed
    big = "x = bytearray(300 << 20)\n" + SUM
    assert run_program(big, cases=CASES, memory_mib=512).passed
    assert run_program(big, cases=CASES, memory_mib=256).status == "memory"


def test_nothing_is_left_from_one_input_to_the_next() -> None:
    source = "import os\nprint(input(), os.listdir('/tmp'))\nopen('/tmp/x', 'w').write('x')"
    assert run_program(source, cases=[("a", "a []"), ("b", "b []")]).passed


def test_large_inputs_and_outputs_arrive_whole() -> None:
    text = "\n".join(map(str, range(200_000)))
    assert run_program("import sys\nsys.stdout.write(sys.stdin.read())", cases=[(text, text)]).passed


def test_many_programs_with_many_pairs_run_in_one_batch() -> None:
    jobs = [ProgramJob(source=SUM.replace("sum", name), cases=CASES) for name in ("sum", "max", "sum")]
    results = run_programs(jobs, num_workers=2)
    assert [(result.status, result.asserts_passed) for result in results] == [
        ("passed", 3),
        ("failed", 0),
        ("passed", 3),
    ]


@pytest.mark.parametrize("language", ["cpp", "java", "python2", "unknown", ""])
def test_other_languages_are_refused_by_name(language: str) -> None:
    with pytest.raises(UserInputError, match=repr(language)) as caught:
        run_program("int main() {}", cases=CASES, language=language)
    assert "python3" in str(caught.value.remedy)


@pytest.mark.parametrize("others", [{"tests": ""}, {"setup": "x = 1"}, {"stdin": "1"}])
def test_pairs_and_tests_do_not_go_together(others: dict[str, str]) -> None:
    with pytest.raises(UserInputError, match="cases and"):
        run_program(SUM, cases=CASES, **others)  # type: ignore[arg-type]


def test_no_pairs_are_refused() -> None:
    with pytest.raises(UserInputError, match="cases is empty"):
        run_program(SUM, cases=[])
