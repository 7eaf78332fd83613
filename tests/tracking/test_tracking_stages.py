"""Progress of work that counts what is done: a line a stage, or a bar in a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from wmtp.tracking import StageDisplay


def show(*, is_terminal: bool) -> str:
    stream = io.StringIO()
    with StageDisplay(console=Console(file=stream, force_terminal=is_terminal, width=100)) as display:
        for stage in ("toy: generate [0]", "toy: run programs"):
            for number in range(1, 4):
                display.update(stage, number, 3)
    return stream.getvalue()


def test_elsewhere_than_in_a_terminal_a_stage_is_one_line_when_it_is_done() -> None:
    lines = show(is_terminal=False).splitlines()
    assert [line.partition(" done in ")[0] for line in lines] == [
        "toy: generate [0]: 3",
        "toy: run programs: 3",
    ]


def test_in_a_terminal_every_stage_has_a_bar_that_ends_full() -> None:
    shown = show(is_terminal=True)
    assert "toy: generate [0]" in shown
    assert "toy: run programs" in shown
    assert shown.count("3/3") >= 2
