"""Reports: what they say, what they leave out, and that nothing in them can act."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from wmtp.reporting import ProgramSample, ReportRun, Score, TokenView, write_report

HOSTILE = (
    "</code></pre><script>alert(1)</script><img src=x onerror=alert(1)> "
    "\" ' `` ``` | $x$ & \x00\x1b[2J \u202e{{ 7 * 7 }}"
)


class _Page(HTMLParser):
    """Collects what a browser would act on, and the text it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.classes: list[str | None] = []
        self._stack: list[str | None] = []
        self.token_texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag == "pre":
            is_tokens = dict(attrs).get("class") == "tokens"
            self._stack.append("tokens" if is_tokens else "pre")
            if is_tokens:
                self.token_texts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self._stack.pop()

    def handle_data(self, data: str) -> None:
        if self._stack and self._stack[-1] == "tokens":
            self.token_texts[-1] += data


def _history(num_steps: int = 30, num_heads: int = 2, **constant: float) -> list[dict[str, float]]:
    return [
        {
            "step": step,
            "time": 1.0,
            "train/loss": 3 / step,
            "train/ce_mean": 3 / step,
            **{f"train/ce_head_{head}": (head + 3) / step for head in range(num_heads)},
            **constant,
        }
        for step in range(1, num_steps + 1)
    ]


def _run(
    name: str = "rho1-wmtp", algo: str = "rho1-wmtp", value: float = 0.85, **changes: object
) -> ReportRun:
    run = ReportRun(
        name=name,
        algo=algo,
        scores=[
            Score(benchmark="MicroCode", value=value, low=value - 0.05, high=value + 0.05, num_problems=200)
        ],
        metrics={"microcode_pass_at_1": value, "train/loss": 0.5, "perplexity/head_0": 1.25},
        history=_history(**{"train/weight_std": 0.5, "rho1/excess_mean": 0.2}),
        token_views=[
            TokenView(
                title="A program",
                tokens=["def", " f", "(", ")", ":", "\n", "    ", "return", " 한국어"],
                weights=[None, 2.5, 1.0, 0.1, 1.0, 3.0, 0.05, 1.2, 0.9],
                ce=[[None, None], *([0.5, 1.5] for _ in range(8))],
            )
        ],
        samples=[
            ProgramSample(
                prompt="# add\n", completion="def f(): pass\n", status="failed", detail="wrong", title="t/1"
            )
        ],
        settings_yaml="train:\n  seed: 0\n",
        timings={"Train": 61.0, "Evaluate": 5.0},
        notes=["HumanEval was not run."],
    )
    return dataclasses.replace(run, **changes)


def _write(folder: Path, *runs: ReportRun, title: str = "A report") -> tuple[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write_report(folder, title, runs)
    return paths.html.read_text(encoding="utf-8"), paths.markdown.read_text(encoding="utf-8")


def test_everything_a_run_has_is_shown_in_both_forms(tmp_path: Path) -> None:
    page, markdown = _write(tmp_path, _run())
    for text in (
        "85% of MicroCode",
        "80% to 90%",
        "Which tokens counted",
        "Loss curves",
        "Weight statistics",
        "Critic and reference",
    ):
        assert text in page, text
        assert text in markdown, text
    for text in (
        "HumanEval was not run.",
        "Generated programs",
        "failed",
        "wrong",
        "1 min 06 s",
        "seed: 0",
        "perplexity/head",
    ):
        assert text in page
        assert text in markdown.replace("\\_", "_")
    assert "weight 2.50 · CE head 1 0.50 · CE head 2 1.50" in page
    for name in re.findall(r"\]\((figures/[^)]+)\)", markdown):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_what_a_run_lacks_is_left_out(tmp_path: Path) -> None:
    page, markdown = _write(tmp_path, ReportRun(name="a", algo="baseline-mtp"))
    assert "Nothing was measured." in page
    assert _Page(page).tags["section"] == 0
    assert not re.search(r"^##", markdown, re.MULTILINE)


def test_uniform_weights_draw_no_weight_statistics(tmp_path: Path) -> None:
    baseline = _run(
        "baseline-mtp", "baseline-mtp", history=_history(**{"train/weight_std": 0.0}), token_views=[]
    )
    page, _ = _write(tmp_path, baseline)
    assert "Weight statistics" not in page
    assert "Which tokens counted" not in page


def test_arms_are_compared_line_by_line_and_named_once_in_the_legend(tmp_path: Path) -> None:
    runs = [_run("baseline-mtp", "baseline-mtp", 0.4), _run("critic-wmtp", "critic-wmtp", 0.6), _run()]
    page, markdown = _write(tmp_path, *runs)
    assert "rho1-wmtp solves most: 85% of MicroCode, against 40% for baseline-mtp." in page
    assert "Cross entropy, head 2" in page
    assert markdown.count("| **rho1-wmtp** | 85% | 80% to 90% | 200 |") == 1
    for place in (1, 2, 3):
        assert f"var(--series-{place})" in page


def test_nothing_in_a_hostile_text_acts(tmp_path: Path) -> None:
    view = TokenView(title=HOSTILE, tokens=[HOSTILE, "\n", HOSTILE], weights=[None, 2.0, 0.2])
    run = _run(
        HOSTILE,
        HOSTILE,
        token_views=[view],
        samples=[
            ProgramSample(prompt=HOSTILE, completion=HOSTILE, status=HOSTILE, title=HOSTILE, detail=HOSTILE)
        ],
        settings_yaml=HOSTILE,
        notes=[HOSTILE],
        timings={HOSTILE: 1.0},
        metrics={HOSTILE: 1.0},
        scores=[Score(benchmark=HOSTILE, value=0.5, low=0.4, high=0.6)],
    )
    page_text, markdown = _write(tmp_path, run, _run(), title=HOSTILE)
    page = _Page(page_text)
    assert page.tags["script"] == 0
    assert page.tags["img"] == 0
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert "\x00" not in page_text
    assert "\x1b" not in page_text
    assert "\u202e" not in page_text
    assert "{{ 7 * 7 }}" in page_text, "shown, not evaluated"
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"(?<!\\)<(script|img)", re.sub(r"(`+) .*? \1", "", outside))
    assert "\x1b" not in markdown


def test_the_page_is_self_contained_and_made_for_phones_dark_mode_and_readers(tmp_path: Path) -> None:
    page_text, _ = _write(tmp_path, _run("실험 1"), _run())
    page = _Page(page_text)
    assert not re.search(r"https?:|url\((?!#)|@import|<link|<script", page_text)
    assert "default-src 'none'" in page_text
    assert 'name="viewport"' in page_text
    assert "prefers-color-scheme: dark" in page_text
    assert '<html lang="en">' in page_text
    labels = [value for name, value in page.attributes if name == "aria-label" and value is not None]
    pictures = page_text.count('role="img"')
    assert pictures >= 5
    assert sum("up to step 30" in label for label in labels) == pictures
    ids = Counter(value for name, value in page.attributes if name == "id")
    assert not [value for value, count in ids.items() if count > 1]
    assert set(re.findall(r"url\(#([^)]+)\)", page_text)) <= set(ids)
    assert "실험 1" in page_text


def test_the_text_between_the_colours_is_the_program(tmp_path: Path) -> None:
    page, _ = _write(tmp_path, _run())
    assert _Page(page).token_texts == ["def f():↵\n    return 한국어"]


def test_the_same_data_gives_the_same_page(tmp_path: Path) -> None:
    first = _write(tmp_path / "a", _run(), _run("b"))
    assert _write(tmp_path / "b", _run(), _run("b")) == first
    assert _write(tmp_path / "a", _run(), _run("b")) == first


def test_holes_and_bad_values_in_a_history_are_skipped(tmp_path: Path) -> None:
    history = [
        {"step": 1, "train/loss": math.nan, "val/loss": 1.0},
        {"step": 2, "train/loss": 2.0},
        {"step": 3, "train/loss": math.inf},
        {"step": 4, "train/loss": 1.0, "train/weight_std": math.nan},
    ]
    page, _ = _write(tmp_path, _run(history=history))
    assert "train from 2 to 1" not in page
    assert "Training loss up to step 4: rho1-wmtp from 2 to 1." in page
    assert "Validation loss" not in page, "one point is no curve"


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_runs_must_exist_and_differ_in_name(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(ValueError, match="different names"):
        write_report(tmp_path, "t", [_run(name) for name in names])
    assert list(tmp_path.iterdir()) == []


def test_a_token_view_whose_lists_do_not_match_is_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens, 1 weights"):
        TokenView(title="x", tokens=["a", "b"], weights=[1.0])


def test_a_program_cannot_end_its_markdown_fence(tmp_path: Path) -> None:
    sample = ProgramSample(prompt="", completion="````\n# not a heading\n```\n", status="passed")
    _, markdown = _write(tmp_path, _run(samples=[sample]))
    assert "`````python\n````\n# not a heading\n```\n`````" in markdown
