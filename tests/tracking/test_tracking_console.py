"""The console: a live line in a terminal, one plain line a log step elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from wmtp.tracking import PhaseDisplay, ProgressDisplay

METRICS = {
    "train/loss": 2.34567,
    "train/tokens_per_second": 12345.6,
    "train/memory_peak_gib": 1.25,
    "other": 1.0,
}


def _run(console: Console) -> None:
    with ProgressDisplay(20, title="rho1 [b]한글[/b]", console=console) as display:
        for step in range(1, 21):
            display.update(step, METRICS if step % 10 == 0 else None)


def test_elsewhere_each_log_step_is_one_plain_line() -> None:
    output = io.StringIO()
    _run(Console(file=output, force_terminal=False, width=40))
    lines = output.getvalue().splitlines()
    assert len(lines) == 2
    assert "\x1b" not in output.getvalue()
    assert lines[0].startswith("rho1 [b]한글[/b]  step 10/20  loss 2.3457  12,346 tokens/s")
    assert lines[0].endswith("left  1.25 GiB")


def test_in_a_terminal_the_line_is_drawn_and_ends_complete() -> None:
    output = io.StringIO()
    _run(Console(file=output, force_terminal=True, width=140))
    assert "\x1b[" in output.getvalue()
    assert "20/20" in output.getvalue()
    assert "loss 2.3457" in output.getvalue()
    assert "[b]" in output.getvalue()


def test_only_what_is_known_is_shown_and_a_resume_counts_its_own_steps() -> None:
    output = io.StringIO()
    with ProgressDisplay(20, start_step=10, console=Console(file=output, width=200)) as display:
        display.update(10, {"train/loss": float("nan")})
        display.update(15, {})
    first, second = output.getvalue().splitlines()
    assert first == "train  step 10/20  loss nan"
    assert second == "train  step 15/20  0.0 s left"


def test_phases_are_announced_timed_and_kept_in_order() -> None:
    output = io.StringIO()
    display = PhaseDisplay(total=2, console=Console(file=output, width=200))
    with display.phase("Train"):
        display.status("10 [steps]")
    with pytest.raises(RuntimeError), display.phase("Evaluate"):
        raise RuntimeError
    text = output.getvalue()
    assert (
        text
        == "[1/2] Train\n      10 [steps]\n      done in 0.0 s\n[2/2] Evaluate\n[2/2] Evaluate: stopped\n"
    )
    assert list(display.timings) == ["Train"]
