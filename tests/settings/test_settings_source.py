"""YAML and the environment: how text becomes values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from wmtp.settings.environment import SubstitutionError, substitute
from wmtp.settings.source import Document, dotted, parse_value


def read(text: str, environment: Mapping[str, str] | None = None) -> tuple[Any, Document]:
    document = Document("file.yaml")
    _, value = parse_value(text, document, (), environment or {}, has_lines=True)
    return value, document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3.", 3.0),
        (".5", 0.5),
        ("-12", -12),
        ("007", 7),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("-.inf", -math.inf),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("nan", "nan"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    found = read(f"key: {text}")[0]["key"]
    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(read("key: .NaN")[0]["key"])


def test_every_value_knows_its_line() -> None:
    _, document = read("a:\n  b: 1\n  c:\n    - x\n    - y\n\nd: {e: 2}\n")
    lines = {dotted(path): origin.line for path, origin in document.origins.items() if path}
    assert lines == {"a": 1, "a.b": 2, "a.c": 3, "a.c[0]": 4, "a.c[1]": 5, "d": 7, "d.e": 7}


@pytest.mark.parametrize(
    ("text", "rule", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "is given twice, first on line 1", 3),
        ("a:\n  b: 1\n  b: 1\n", "is given twice, first on line 2", 3),
        ("1: x\n", "has the key 1, which is not text", 1),
        ("? [a]\n: x\n", "has the key a list or section, which is not text", 1),
        ("a: !!python/object:os.system x\n", "has a tag that is not plain data", 1),
        ("a: !own {b: 1}\n", "has a tag that is not plain data", 1),
        ("a: !own ${HOME:-}\n", "has a tag that is not plain data", 1),
        ("a: !!set {b}\n", "has a tag that is not plain data", 1),
        ("a: !!int x\n", "cannot be read as int", 1),
        (f"a: {'9' * 5000}\n", "cannot be read as int", 1),
        ("a: &x [*x]\n", "contains itself", 1),
        ("a: *x\n", "is not valid YAML: found undefined alias", 1),
        ("a: {b: ${X}}\n", "is not valid YAML", 1),
    ],
)
def test_what_is_not_plain_data_is_a_problem_at_its_line(text: str, rule: str, line: int) -> None:
    _, document = read(text)
    (problem,) = document.unreadable.values()
    assert problem.rule.startswith(rule)
    assert problem.line == line


def test_a_few_aliases_cannot_stand_for_billions_of_values() -> None:
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]
    _, document = read("\n".join(["l0: &l0 [x]", *levels]))
    rules = {problem.rule for problem in document.unreadable.values()}
    assert rules == {"makes over 10000 values"}
    assert len(document.unreadable) < 200


def test_an_alias_is_the_value_it_names() -> None:
    assert read("a: &x [1, 2]\nb: *x\n")[0] == {"a": [1, 2], "b": [1, 2]}


def test_a_reference_in_a_flow_section_gets_the_remedy_to_quote_it() -> None:
    _, document = read("a: {b: ${X}}\n")
    assert "quotes" in document.unreadable[()].remedy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${A}", "alpha"),
        ("x/${A}/${A}", "x/alpha/alpha"),
        ("${MISSING:-other}", "other"),
        ("${A:-other}", "alpha"),
        ("${EMPTY:-other}", "other"),
        ("${EMPTY}", ""),
        ("${MISSING:-}", ""),
        ("${MISSING:-a:-b c}", "a:-b c"),
        ("$A and $$ stay", "$A and $$ stay"),
        ("$${A}", "${A}"),
        ("${TRICK}", "${A}"),
    ],
)
def test_references_are_replaced_once(text: str, expected: str) -> None:
    assert substitute(text, {"A": "alpha", "EMPTY": "", "TRICK": "${A}"}) == expected


@pytest.mark.parametrize("text", ["${MISSING}", "${A", "${}", "${1A}", "${A B}", "${A-x}", "${M:-${A}}"])
def test_a_reference_without_value_or_form_is_an_error(text: str) -> None:
    with pytest.raises(SubstitutionError) as caught:
        substitute(text, {"A": "alpha"})
    assert caught.value.remedy


def test_the_environment_is_read_in_values_after_parsing_and_never_in_keys() -> None:
    value, _ = read("a: ${X}\n${X}: 1\nc: ['${X}']\n", {"X": "1\nb: {2: 3}"})
    assert value == {"a": "1\nb: {2: 3}", "${X}": 1, "c": ["1\nb: {2: 3}"]}


def test_a_substituted_scalar_reads_as_the_value_it_spells() -> None:
    value, _ = read("a: ${X}\nb: '${X}'\nc: ${Y:-}\nd: ${Z:-true}\n", {"X": "8"})
    assert value == {"a": 8, "b": 8, "c": None, "d": True}


def test_an_unset_variable_names_variable_and_line() -> None:
    _, document = read("a: 1\nb:\n  c: ${NOT_THERE}\n")
    (problem,) = document.unreadable.values()
    assert (problem.line, problem.key) == (3, "b.c")
    assert "NOT_THERE" in problem.rule
    assert "${NOT_THERE:-default}" in problem.remedy
