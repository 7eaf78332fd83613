"""`wmtp doctor` on the command line: its lines, its exit code, and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from wmtp.cli.app import main
from wmtp.cli.doctor import print_checks
from wmtp.pipelines.doctor_check import Check


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_machine_that_works_is_told_in_lines_and_leaves_with_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("doctor") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0].startswith("works    machine: python: 3.")
    assert any(line.startswith("works    output: paths.output:") for line in lines)
    assert lines[-1].startswith("0 broken, ")
    assert list(tmp_path.iterdir()) == []


def test_what_is_broken_is_told_with_what_to_do_and_leaves_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "config.yaml").write_text("paths: {output: file/runs}\n")
    assert run_cli("doctor", "--config", "config.yaml") == 1
    lines = capsys.readouterr().out.splitlines()
    position = next(number for number, line in enumerate(lines) if line.startswith("broken"))
    assert lines[position].startswith(
        f"broken   output: paths.output: {tmp_path}/file/runs cannot be written"
    )
    assert lines[position + 1] == (
        "         do: set paths.output to a folder on a local disk, or to s3://bucket/prefix"
    )


def test_json_is_nothing_but_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("paths: {output: runs}\n")
    arguments = ("--config", "config.yaml", "--set", "paths.output=/proc/wmtp", "--json")
    assert run_cli("doctor", *arguments) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "broken"
    broken = [check for check in report["checks"] if check["status"] == "broken"]
    assert {(check["group"], check["subject"]) for check in broken} >= {("output", "paths.output")}
    assert set(broken[0]) == {"group", "subject", "status", "detail", "remedy"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "absent.yaml"], "absent.yaml: does not exist"),
        (["--set", "paths.output=x"], "--set changes a config, and none was given"),
        (["--config", "wrong.yaml"], "wrong.yaml:1: storage: is a key of the older layout"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text("storage: {mode: local}\n")
    assert run_cli("doctor", *arguments) == 2
    captured = capsys.readouterr()
    assert expected in " ".join(captured.err.split())
    assert captured.out == ""


def test_on_a_terminal_the_lines_are_a_table_with_each_group_named_once() -> None:
    console = Console(force_terminal=True, width=100, record=True, color_system=None)
    checks = [
        Check("s3", "server", "works", "answers"),
        Check("s3", "bucket b", "broken", "there is none", "create it"),
        Check("hub", "token", "warning", "there is none", "set HF_TOKEN"),
    ]
    assert print_checks(console, iter(checks)) == checks
    text = console.export_text()
    assert text.count("s3 ") == 1
    assert "do: create it" in text
    assert "1 broken, 1 to look at, 3 looked at" in text
