"""The pure parts of a report: headline, tables, shades, texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp.reporting import (
    ReportRun,
    Score,
    TokenView,
    format_duration,
    format_number,
    format_percent,
    tokens_for_terminal,
)
from wmtp.reporting.curves import curve_sections
from wmtp.reporting.summary import finding_table, headline, score_tables, timing_table
from wmtp.reporting.text import visible
from wmtp.reporting.tokens import heaviest_tokens, shade, tokens_as_lines


def _run(name: str, value: float | None = None, spread: float | None = 0.05, **changes: object) -> ReportRun:
    scores = []
    if value is not None:
        low, high = (None, None) if spread is None else (value - spread, value + spread)
        scores = [Score(benchmark="M", value=value, low=low, high=high, num_problems=100)]
    return ReportRun(name=name, algo=name, scores=scores, **changes)  # type: ignore[arg-type]


def test_one_run_is_described() -> None:
    top = headline([_run("rho1-wmtp", 0.5)])
    assert top.conclusion == "rho1-wmtp solves 50% of M."
    assert top.detail == "pass@1 0.500, 95% interval 45% to 55%, 100 problems."


@pytest.mark.parametrize(
    ("other", "word"), [(0.3, "do not overlap"), (0.45, "overlap, so the difference may be chance")]
)
def test_the_best_is_compared_with_the_baseline_and_chance_is_named(other: float, word: str) -> None:
    top = headline([_run("baseline-mtp", other), _run("critic-wmtp", 0.52), _run("rho1-wmtp", 0.53)])
    assert (
        top.conclusion
        == f"rho1-wmtp solves most: 53% of M, against {format_percent(other)} for baseline-mtp."
    )
    assert word in top.detail


def test_a_baseline_that_wins_is_called_the_winner() -> None:
    top = headline([_run("baseline-mtp", 0.9), _run("rho1-wmtp", 0.5), _run("critic-wmtp", 0.6)])
    assert top.conclusion == "baseline-mtp solves most: 90% of M, against 60% for critic-wmtp."
    assert top.detail.startswith("No weighting did better here. ")


def test_a_tie_is_a_tie() -> None:
    top = headline([_run("a", 0.5), _run("b", 0.5), _run("c", 0.1)])
    assert top.conclusion == "a and b solve equally many: 50% of M."


def test_without_intervals_nothing_is_said_of_chance() -> None:
    assert headline([_run("a", 0.5, None), _run("b", 0.4, None)]).detail == "pass@1 on 100 problems."


def test_without_scores_the_losses_and_the_reason_are_told() -> None:
    top = headline([_run("a", history=[{"step": 1, "train/loss": 2.5}], notes=["No sandbox."])])
    assert top.conclusion == "No generated programs were run."
    assert top.detail == "Last training loss: a 2.5. No sandbox."


def test_tables_are_by_benchmark_and_k_and_mark_the_best() -> None:
    scores = [
        Score(benchmark="H", k=10, value=0.3),
        Score(benchmark="H", k=1, value=0.1),
        Score(benchmark="M", value=1.0),
    ]
    first = ReportRun(name="a", algo="x", scores=scores)
    second = ReportRun(name="b", algo="y", scores=[Score(benchmark="H", k=1, value=0.2)])
    human, micro = score_tables([first, second, ReportRun(name="c", algo="z")])
    assert (human.benchmark, human.ks) == ("H", [1, 10])
    assert [(row.run.name, row.main.value, row.is_best) for row in human.rows] == [
        ("a", 0.1, False),
        ("b", 0.2, True),
    ]
    assert [row.is_best for row in micro.rows] == [False], "one run alone is not the best of any"


def test_findings_are_results_and_not_curves_or_pass_rates() -> None:
    run = ReportRun(
        name="a", algo="x", metrics={"train/loss": 1, "val/loss": 1, "m_pass_at_1": 1, "critic/auc": 0.9}
    )
    assert finding_table([run]) == [("critic/auc", ["0.9"])]


def test_times_are_summed_and_absent_phases_stay_empty() -> None:
    runs = [
        _run("a", timings={"Train": 60.0, "Evaluate": 30.0}),
        _run("b", timings={"Train": 10.0}),
        _run("c"),
    ]
    assert timing_table(runs) == [
        ("Train", ["1 min 00 s", "10 s", ""]),
        ("Evaluate", ["30 s", "", ""]),
        ("Total", ["1 min 30 s", "10 s", ""]),
    ]


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_shades_keep_the_order_of_weights_and_their_bounds(first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert -1 <= shade(low) <= shade(high) <= 1


def test_the_mean_weight_has_no_colour_and_the_default_bounds_have_full_colour() -> None:
    assert (shade(1.0), shade(3.0), shade(0.05), shade(0.0)) == (0.0, 1.0, -1.0, -1.0)


def test_the_heaviest_tokens_come_first_and_blanks_are_seen() -> None:
    view = TokenView(title="t", tokens=["a", "  ", "\n", "b"], weights=[1.0, 3.0, 2.0, None])
    assert heaviest_tokens(view, 3) == [("··", 3.0), ("↵", 2.0), ("a", 1.0)]


def test_bars_stand_under_their_tokens_also_for_wide_signs() -> None:
    view = TokenView(
        title="t", tokens=["ab", "한", "\tc", "\n", "\n", "d"], weights=[3.0, 0.05, 1.0, 1.0, 1.0, None]
    )
    lines = tokens_as_lines(view)
    assert lines[0] == "ab한    c"
    assert lines[1][:4] == "██▁▁"
    assert len(lines[1]) == 9
    assert lines[2:] == ["", "", "d"]


def test_the_terminal_shows_the_text_itself() -> None:
    view = TokenView(title="t", tokens=["def", " [b]", "\x1b[2J"], weights=[None, 3.0, 0.1])
    text = tokens_for_terminal(view)
    assert text.plain == "def [b]␛[2J"
    assert len({str(span.style) for span in text.spans}) == 2


@given(st.text())
def test_visible_text_holds_nothing_that_acts_on_a_screen(text: str) -> None:
    shown = visible(text)
    assert not {sign for sign in shown if ord(sign) < 32 and sign not in "\n\t"}
    assert not set(shown) & set("\x7f\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069")
    shown.encode()
    assert visible(shown) == shown


def test_control_signs_are_shown_and_not_sent() -> None:
    assert visible("\x00\x1b\x7f\x9b\ud800\u202e\r\n한") == "␀␛␡\\u009b\\ud800\\u202e\n한"


def test_a_long_curve_is_thinned_to_means_and_keeps_its_last_step() -> None:
    history = [{"step": step, "train/loss": float(step % 2)} for step in range(1, 10_001)]
    (section,) = curve_sections([_run("a", history=history)])
    (line,) = section.panels[0].series
    assert len(line.steps) <= 160
    assert line.steps[-1] == 10_000
    assert all(abs(value - 0.5) < 0.01 for value in line.values)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.123456, "0.1235"),
        (-2.5, "\u22122.5"),
        (12345.6, "12,346"),
        (1e-7, "1e\u221207"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text


def test_percents_are_short() -> None:
    assert [format_percent(value) for value in (0, 0.85, 0.8451, 1)] == ["0%", "85%", "84.5%", "100%"]
