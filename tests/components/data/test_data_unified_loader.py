"""One loader for every dataset: files, directories, built-in ones, MBPP as published."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from wmtp.components.data import (
    DataLoaderContext,
    DataLoaderSettings,
    MicroCodeOptions,
    UnifiedDataLoader,
)
from wmtp.components.registry import loader_registry
from wmtp.exceptions import DataError, UserInputError

MBPP = Path(__file__).parents[3] / "../shared/data/mbpp/mbpp.jsonl"


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def texts(loader: UnifiedDataLoader, source: Path | str, **arguments: Any) -> list[str]:
    return [example.completion for example in loader.load(str(source), **arguments)]


def test_the_registry_builds_it_and_a_context_runs_it(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"prompt": "b", "completion": "c"}])
    loader = loader_registry.create("unified-data-loader", {"dataset_path": source})
    assert [example.row_id for example in loader.run(DataLoaderContext())] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert loader.run(DataLoaderContext(dataset_path=source, limit=1)) == loader.load(limit=1)


@pytest.mark.skipif(not MBPP.exists(), reason="MBPP is not part of the repository")
@pytest.mark.parametrize(
    ("split", "first", "last"),
    [("prompt", 1, 10), ("test", 11, 510), ("validation", 511, 600), ("train", 601, 974), (None, 1, 974)],
)
def test_mbpp_as_published_splits_by_task_id(split: Any, first: int, last: int) -> None:
    examples = UnifiedDataLoader().load(str(MBPP), split=split)
    assert [int(example.task.task_id) for example in examples if example.task] == list(range(first, last + 1))
    assert examples[0].row_id == f"mbpp.jsonl:{first}"
    assert not any("\r" in example.completion + example.prompt for example in examples)


def test_builtin_humaneval_has_all_problems() -> None:
    examples = UnifiedDataLoader().load("builtin:humaneval", split="test")
    assert len(examples) == 164
    assert all(example.task is not None and example.completion for example in examples)


def test_builtin_microcode_follows_its_options() -> None:
    options = MicroCodeOptions(seed=3, num_examples=40, wrong_ratio=0.5, comment_ratio=0.0)
    loader = UnifiedDataLoader(DataLoaderSettings(microcode=options))
    train = loader.load("builtin:microcode")
    assert train == UnifiedDataLoader(DataLoaderSettings(microcode=options)).load("builtin:microcode")
    assert len(train) == 40
    wrong = [example for example in train if example.task and example.completion != example.task.reference]
    assert 10 <= len(wrong) <= 30
    held_out = loader.load("builtin:microcode", split="test", limit=10)
    assert len(held_out) == 10
    assert all(example.task and example.completion == example.task.reference for example in held_out)


def test_the_first_usable_row_decides_the_form_of_a_file(tmp_path: Path) -> None:
    mbpp_row = {"task_id": 700, "text": "t", "code": "c", "test_list": ["assert c"]}
    source = write_rows(tmp_path / "rows.jsonl", [mbpp_row, {"text": "only text"}])
    with pytest.raises(
        DataError, match=r"rows.jsonl:2: the row lacks the fields of MBPP.*found text"
    ) as error:
        UnifiedDataLoader().load(source)
    assert "task_id + text + code + test_list" in str(error.value)


def test_a_bad_row_stops_with_file_line_and_accepted_forms(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"txt": "b"}])
    with pytest.raises(DataError, match=r"rows.jsonl:2: the row lacks .*found txt") as error:
        UnifiedDataLoader().load(source)
    assert "prompt + completion" in str(error.value)
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, "{oops"])
    with pytest.raises(DataError, match=r"rows.jsonl:2: not valid JSON"):
        UnifiedDataLoader().load(source)


def test_bad_rows_are_skipped_and_counted_where_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"wrong": 1}, {"text": "a"}, "{oops", {"text": ""}, {"text": "b"}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        assert texts(UnifiedDataLoader({"on_bad_row": "skip"}), source) == ["a", "b"]
    assert len(caplog.messages) == 1
    assert "skipped 3 bad row(s); the first: rows.jsonl:1: the row lacks the fields" in caplog.messages[0]


@pytest.mark.parametrize("rows", [[], ["", "  "]])
def test_an_empty_dataset_is_an_error(tmp_path: Path, rows: list[Any]) -> None:
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="no usable rows"):
        UnifiedDataLoader().load(source)


def test_a_dataset_of_bad_rows_alone_is_an_error_though_they_are_skipped(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"x": 1}])
    with pytest.raises(DataError, match="no usable rows"):
        UnifiedDataLoader({"on_bad_row": "skip"}).load(source)


def test_file_names_in_a_directory_tell_the_split(tmp_path: Path) -> None:
    for name in ("train-00000.jsonl", "train-00001.jsonl", "dev.jsonl", "test/latest.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name, [{"text": name}])
    loader = UnifiedDataLoader()
    assert texts(loader, tmp_path, split="train") == ["train-00000.jsonl", "train-00001.jsonl"]
    assert texts(loader, tmp_path, split="validation") == ["dev.jsonl"]
    assert texts(loader, tmp_path, split="test") == ["test/latest.jsonl"]
    assert len(texts(loader, tmp_path, split=None)) == 4
    with pytest.raises(DataError, match=r"no files of split 'prompt'; it has dev.jsonl"):
        loader.load(str(tmp_path), split="prompt")
    # A file that is named is meant, whatever it is called.
    assert texts(loader, tmp_path / "dev.jsonl", split="train") == ["dev.jsonl"]


def test_a_files_own_name_says_more_than_its_folder(tmp_path: Path) -> None:
    for name in ("test-suite/train.jsonl", "test-suite/rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name, [{"text": name}])
    assert texts(UnifiedDataLoader(), tmp_path, split="train") == ["test-suite/train.jsonl"]
    assert texts(UnifiedDataLoader(), tmp_path, split="test") == ["test-suite/rows.jsonl"]


def test_a_directory_without_split_names_is_taken_whole(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path / name, [{"text": name}])
    assert texts(UnifiedDataLoader(), tmp_path, split="validation") == ["a.jsonl", "b.jsonl"]


def test_streams_read_no_further_than_they_must(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}, "{oops"])
    assert texts(UnifiedDataLoader(), source, limit=2) == ["a", "b"]
    stream = UnifiedDataLoader().stream(source)
    assert [next(stream).completion, next(stream).completion] == ["a", "b"]


def test_settings_it_does_not_know_are_refused() -> None:
    with pytest.raises(UserInputError, match="DataLoaderSettings has no field path"):
        UnifiedDataLoader({"path": "x"})
    with pytest.raises(UserInputError, match="DataLoaderSettings cannot be made from str"):
        UnifiedDataLoader("x")  # type: ignore[arg-type]


def test_sources_and_splits_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    loader = UnifiedDataLoader()
    with pytest.raises(DataError, match="unknown built-in dataset 'builtin:nothing'"):
        loader.load("builtin:nothing")
    with pytest.raises(DataError, match="does not exist"):
        loader.load(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="no dataset is named"):
        loader.load()
    with pytest.raises(UserInputError, match="unknown split 'training'"):
        loader.load("builtin:microcode", split="training")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no split 'prompt'"):
        loader.load("builtin:microcode", split="prompt")
