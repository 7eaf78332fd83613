"""Pages with everything that was generated, so that every verdict can be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from wmtp.reporting.pages import page_template

# A page stays light enough for a phone: so many programs, so many characters.
_MAX_PROGRAMS: Final = 400
_MAX_CHARS: Final = 1_500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedProgram:
    """One generated program to show.

    Args:
        line: its line in the file of generations, from 1.
        task_id: the problem.
        prompt: what the model was given.
        program: what was run.
        completion: what the model wrote.
        title: such as `sample 3 at temperature 0.8`.
        facts: seed, tokens, time.
        kind: `passed`, or why not.
        message: what went wrong.
    """

    line: int
    task_id: str
    prompt: str
    program: str
    completion: str
    title: str
    facts: str
    kind: str
    message: str

    @property
    def verdict(self) -> str:
        """The class of its verdict's colour."""
        return "good" if self.kind == "passed" else "bad"


def write_generation_pages(
    folder: Path, dataset: str, file: str, problems: Mapping[str, Sequence[GeneratedProgram]]
) -> tuple[dict[str, str], dict[int, str]]:
    """Write `<dataset>.page-<n>.html` pages; older ones of the dataset are removed.

    Args:
        folder: where they go.
        dataset: named in titles and file names.
        file: name of the file of generations in the same folder.
        problems: the programs of every problem, in order.

    Returns:
        Where each problem is, and where each line is: a page's name with an anchor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{dataset}.page-*.html"):
        old.unlink()
    numbered = [(number, *item) for number, item in enumerate(problems.items(), 1)]
    chunks = _chunks(numbered)
    names = [f"{dataset}.page-{number}.html" for number in range(1, len(chunks) + 1)]
    template = page_template("generations.html.j2")
    problem_places, line_places = {}, {}
    for name, chunk in zip(names, chunks, strict=True):
        shown: list[dict[str, Any]] = [
            {
                "number": number,
                "task_id": task_id,
                "prompt": programs[0].prompt,
                "passed": sum(program.kind == "passed" for program in programs),
                "generations": programs,
            }
            for number, task_id, programs in chunk
        ]
        text = template.render(
            title=f"Generated programs: {dataset}", file=file, pages=names, page=name, problems=shown
        )
        # Lone surrogates were made visible, so everything can be encoded.
        (folder / name).write_text(text, encoding="utf-8")
        for number, task_id, programs in chunk:
            problem_places[task_id] = f"{name}#p-{number}"
            line_places.update({program.line: f"{name}#g-{program.line}" for program in programs})
    return problem_places, line_places


def _chunks(
    numbered: Sequence[tuple[int, str, Sequence[GeneratedProgram]]],
) -> list[list[tuple[int, str, Sequence[GeneratedProgram]]]]:
    """Whole problems, as many as one page takes; at least one."""
    chunks: list[list[tuple[int, str, Sequence[GeneratedProgram]]]] = []
    num_programs = num_chars = 0
    for item in numbered:
        programs = item[2]
        chars = sum(len(each.program) + len(each.completion) + len(each.message) for each in programs)
        is_full = num_programs + len(programs) > _MAX_PROGRAMS or num_chars + chars > _MAX_CHARS
        if not chunks or is_full:
            chunks.append([])
            num_programs = num_chars = 0
        chunks[-1].append(item)
        num_programs, num_chars = num_programs + len(programs), num_chars + chars
    return chunks
