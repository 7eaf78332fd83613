"""Reports of evaluations: temperatures, failures, verdicts, pages; links lead somewhere; hostile texts."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from wmtp.reporting import (
    BenchmarkDetail,
    GeneratedProgram,
    GenerationRef,
    ProblemVerdicts,
    ReportRun,
    ReportTable,
    Score,
    TemperatureScores,
    write_generation_pages,
    write_report,
)
from wmtp.reporting.details import MAX_LINKS, kind_counts, temperature_panel, temperature_table

HOSTILE = "</code></pre><script>alert(1)</script><a href='javascript:1'>x</a> ``` | \x1b[2J \u202e \udc80"
KINDS = ("passed", "wrong value", "SyntaxError", "passed")


class _Page(HTMLParser):
    """Collects links, anchors and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "a":
            self.links.append(str(found["href"]))
        if tag not in ("meta", "path", "use"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def program(line: int, task_id: str, kind: str) -> GeneratedProgram:
    return GeneratedProgram(
        line=line,
        task_id=task_id,
        prompt=f"# {HOSTILE}",
        program=f"def f(x):\n    return {line}  # {HOSTILE}\n",
        completion=f"    return {line}\n",
        title=f"Sample {line}",
        facts="seed 0",
        kind=kind,
        message="" if kind == "passed" else f"Traceback {HOSTILE}",
    )


def write(
    folder: Path, num_problems: int = 30, temperatures: tuple[float, ...] = (0.0, 0.8), repeats: int = 1
) -> BenchmarkDetail:
    """A benchmark with four programs a problem, its pages and its report."""
    kinds = KINDS * repeats
    names = [f"task/{number} {HOSTILE if number == 0 else ''}" for number in range(num_problems)]
    programs = {
        name: [program(len(kinds) * number + i + 1, name, kind) for i, kind in enumerate(kinds)]
        for number, name in enumerate(names)
    }
    problem_places, line_places = write_generation_pages(
        folder / "evaluation", "toy", "toy.generations.jsonl", programs
    )
    (folder / "evaluation/toy.generations.jsonl").write_text("{}\n")
    detail = BenchmarkDetail(
        benchmark=f"toy {HOSTILE}",
        temperatures=[
            TemperatureScores(
                temperature=temperature,
                num_samples=1 if temperature == 0 else 10,
                scores={
                    k: Score(benchmark="toy", value=0.2 + temperature / 4 + k / 100, k=k, low=0.1, high=0.9)
                    for k in ((1,) if temperature == 0 else (1, 10))
                },
            )
            for temperature in temperatures
        ],
        problems=[
            ProblemVerdicts(
                task_id=name,
                href=f"evaluation/{problem_places[name]}",
                generations=[
                    GenerationRef(
                        line=each.line,
                        temperature=0.8,
                        sample=i,
                        kind=each.kind,
                        href=f"evaluation/{line_places[each.line]}",
                    )
                    for i, each in enumerate(programs[name])
                ],
            )
            for name in names
        ],
        file="evaluation/toy.generations.jsonl",
    )
    table = ReportTable(
        title="Self-speculation",
        caption=f"Measured. {HOSTILE}",
        header=["", "Tokens per forward"],
        rows=[["Head 1", "3.2"], [f"Head {HOSTILE}", "1"]],
        metrics=["tokens_per_forward_head_0"],
    )
    metrics = {"tokens_per_forward_head_0": 3.2, "other_finding": 1.0}
    score = Score(benchmark="toy", value=0.2, low=0.1, high=0.3, num_problems=num_problems)
    run = ReportRun(
        name="run", algo="baseline-mtp", scores=[score], metrics=metrics, benchmarks=[detail], tables=[table]
    )
    write_report(folder, "An evaluation", [run])
    return detail


def links_of(file: Path) -> list[str]:
    text = file.read_text()
    return _Page(text).links if file.suffix == ".html" else re.findall(r"\]\(([^)]+)\)", text)


def test_every_link_of_report_and_pages_leads_to_what_it_names(tmp_path: Path) -> None:
    detail = write(tmp_path, num_problems=230)
    pages = sorted((tmp_path / "evaluation").glob("*.html"))
    assert len(pages) == 3
    anchors = {page.name: _Page(page.read_text()).ids for page in pages}
    assert all(len(set(ids)) == len(ids) for ids in anchors.values())
    files = [tmp_path / "report.html", tmp_path / "report.md", *pages]
    num_programs = 0
    for file in files:
        for link in links_of(file):
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            assert target.is_file(), link
            if anchor:
                assert anchor in anchors[target.name], link
                num_programs += anchor.startswith("g-")
    # Every program from the page and from the Markdown.
    assert num_programs == 2 * sum(len(problem.generations) for problem in detail.problems)


def test_very_many_programs_are_linked_by_problem(tmp_path: Path) -> None:
    detail = write(tmp_path, num_problems=20, repeats=MAX_LINKS // 80 + 1)
    assert len(detail.problems[0].generations) * 20 > MAX_LINKS
    for name in ("report.html", "report.md"):
        links = links_of(tmp_path / name)
        assert not any("#g-" in link for link in links)
        assert {problem.href for problem in detail.problems} <= set(links)


def test_the_report_shows_temperatures_failures_verdicts_and_tables(tmp_path: Path) -> None:
    write(tmp_path)
    html, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    for text in (html, markdown):
        for shown in ("0 (greedy), fixed", "50% best", "wrong value", "SyntaxError", "2 of 4"):
            assert shown in text
        assert "2 passed, 1 SyntaxError, 1 wrong value" in text
        assert "Tokens per forward" in text
    assert "temperature_1.png" in markdown
    assert (tmp_path / "figures/temperature_1.png").stat().st_size > 1000
    # What a table shows is not listed again among further measurements.
    findings = html[html.index("Further measurements") :].split("</section>")[0]
    assert "other_finding" in findings
    assert "tokens_per_forward_head_0" not in findings


def test_hostile_texts_act_nowhere(tmp_path: Path) -> None:
    write(tmp_path)
    for file in [tmp_path / "report.html", *(tmp_path / "evaluation").glob("*.html")]:
        page = _Page(file.read_text())
        assert page.open == []
        assert not page.tags & {"script", "img", "iframe", "form", "link"}
        assert not any(link.startswith("javascript") for link in page.links)
        assert "\x1b" not in file.read_text()
        assert "default-src 'none'" in file.read_text()


def test_fewer_pages_replace_more(tmp_path: Path) -> None:
    programs = {str(n): [program(n, str(n), "passed")] for n in range(1, 900)}
    write_generation_pages(tmp_path, "toy", "toy.jsonl", programs)
    assert len([*tmp_path.glob("toy.page-*.html")]) == 3
    write_generation_pages(tmp_path, "toy", "toy.jsonl", {"1": programs["1"]})
    assert [path.name for path in tmp_path.iterdir()] == ["toy.page-1.html"]


def test_a_problem_with_more_than_a_page_takes_is_not_cut(tmp_path: Path) -> None:
    programs = {"a": [program(n, "a", "passed") for n in range(1, 1001)], "b": [program(1001, "b", "passed")]}
    problems, lines = write_generation_pages(tmp_path, "toy", "toy.jsonl", programs)
    assert problems == {"a": "toy.page-1.html#p-1", "b": "toy.page-2.html#p-2"}
    assert lines[1000] == "toy.page-1.html#g-1000"


def test_a_single_temperature_has_no_curve_and_no_marks(tmp_path: Path) -> None:
    detail = write(tmp_path, temperatures=(0.8,))
    assert temperature_panel(detail) is None
    assert temperature_table(detail).rows == [["0.8", "10", "41%", "10% to 90%", "50%", "10% to 90%"]]
    assert "temperature_1.png" not in (tmp_path / "report.md").read_text()
    assert kind_counts(detail) == [("passed", 60, 0.5), ("SyntaxError", 30, 0.25), ("wrong value", 30, 0.25)]


def test_the_curve_is_drawn_with_its_intervals(tmp_path: Path) -> None:
    panel = temperature_panel(write(tmp_path, temperatures=(1.0, 0.4, 0.8)))
    assert panel is not None
    assert panel.series[0].steps == [0.4, 0.8, 1.0]
    assert (panel.series[0].lows, panel.series[0].highs) == ([0.1] * 3, [0.9] * 3)
    svg = (tmp_path / "report.html").read_text().split("by temperature")[2]
    # A filled band a line, in the colours of the page, and no reference to an id that was taken away.
    assert svg.count("opacity: 0.15") >= 2
    assert "var(--series-1)" in svg
