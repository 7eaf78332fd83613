"""Sources of a stream: what is held out, what a file is known by, and where reading goes on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_data_streaming import numbered, write_rows

from wmtp.components.data import (
    Example,
    ExampleSource,
    MicroCodeOptions,
    StreamPosition,
    UnifiedDataLoader,
    hold_out,
    open_source,
    read_epoch,
)
from wmtp.components.data.reading import BadRows, list_data_files
from wmtp.components.data.streaming_sources import text_hash
from wmtp.components.data.unified_loader import FilePosition, read_examples


def open_sources(*paths: str | Path, **options: Any) -> list[ExampleSource]:
    loader = UnifiedDataLoader(options)
    return [
        open_source(loader, f"s{n}", str(path), split="train", names_rows=True)
        for n, path in enumerate(paths)
    ]


def read(sources: Sequence[ExampleSource], excluded: frozenset[str] = frozenset()) -> list[Example]:
    start = StreamPosition.start(len(sources))
    rows = read_epoch(sources, start, seed=0, shuffle=True, excluded=excluded)
    return [example for examples, _, _ in rows for example in examples]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.json"])
def test_a_file_of_any_kind_is_read_on_from_any_row(tmp_path: Path, name: str) -> None:
    (file,) = list_data_files(str(write_rows(tmp_path / name, numbered(0, 23))))
    bad_rows = BadRows("fail")
    whole = list(read_examples(file, None, bad_rows))
    assert [examples[0].completion for _, examples in whole] == [row["text"] for row in numbered(0, 23)]
    for at, (position, _) in enumerate(whole):
        assert list(read_examples(file, None, bad_rows, position)) == whole[at + 1 :]
    assert (whole[0][0].end is not None) == (name == "a.jsonl")


def test_blank_lines_and_a_byte_order_mark_do_not_shift_positions(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n\n{"text": "two \xc3\xa4"}\n   \n{"text": "three"}')
    (file,) = list_data_files(str(path))
    whole = list(read_examples(file, None, BadRows("fail")))
    assert [(position.number, examples[0].completion) for position, examples in whole] == [
        (1, "one"),
        (4, "two ä"),
        (6, "three"),
    ]
    for at, (position, _) in enumerate(whole):
        assert list(read_examples(file, None, BadRows("fail"), position)) == whole[at + 1 :]


def test_going_on_in_a_file_keeps_what_its_first_row_decided(tmp_path: Path) -> None:
    first = {"prompt": "p", "completion": "c"}
    path = write_rows(tmp_path / "rows.jsonl", [first, {**first, "completion": "d"}, {"text": "t"}])
    (file,) = list_data_files(str(path))
    benchmark_row = {"task_id": 700, "text": "t", "code": "c", "test_list": ["assert 1"]}
    mixed = write_rows(tmp_path / "mixed.jsonl", [benchmark_row, {"text": "t"}])
    (mixed_file,) = list_data_files(str(mixed))
    position, _ = next(read_examples(mixed_file, "train", BadRows("fail")))
    with pytest.raises(ValueError, match=r"mixed\.jsonl:2: the row lacks the fields of MBPP"):
        list(read_examples(mixed_file, "train", BadRows("fail"), position))
    assert len(list(read_examples(file, None, BadRows("fail"), FilePosition(1, None, "custom")))) == 2


def test_a_row_of_many_examples_is_never_split(tmp_path: Path) -> None:
    problem = {
        "description": "Add.",
        "solutions": {"language": [3] * 4, "solution": [f"print({n})" for n in range(4)]},
        "incorrect_solutions": {"language": [3], "solution": ["print(9)"]},
    }
    sources = open_sources(write_rows(tmp_path / "contest.jsonl", [problem] * 3))
    rows = list(read_epoch(sources, StreamPosition.start(1), seed=0, shuffle=True))
    assert [len(examples) for examples, _, _ in rows] == [5, 5, 5]
    assert [is_last for _, _, is_last in rows] == [False, False, True]


def test_generated_examples_stream_and_resume_like_files() -> None:
    sources = open_sources("builtin:microcode", microcode=MicroCodeOptions(num_examples=30))
    whole = list(read_epoch(sources, StreamPosition.start(1), seed=0, shuffle=True))
    assert len({examples[0].row_id for examples, _, _ in whole}) == 30
    _, positions, _ = whole[11]
    rest = list(read_epoch(sources, StreamPosition(0, 1, positions), seed=0, shuffle=True))
    assert rest == whole[12:]


def test_positions_survive_json(tmp_path: Path) -> None:
    sources = open_sources(
        write_rows(tmp_path / "a.jsonl", numbered(0, 5)), write_rows(tmp_path / "b.json", numbered(9, 5))
    )
    _, positions, _ = list(read_epoch(sources, StreamPosition.start(2), seed=0, shuffle=True))[6]
    position = StreamPosition(1, 4, positions)
    assert StreamPosition.from_json(position.to_json()) == position


def test_files_come_in_another_order_in_each_epoch(tmp_path: Path) -> None:
    for number in range(6):
        write_rows(tmp_path / f"data/{number}.jsonl", numbered(number, 1))
    sources = open_sources(tmp_path / "data")
    orders = [
        tuple(
            examples[0].row_id
            for examples, _, _ in read_epoch(sources, StreamPosition.start(1, epoch), seed=0, shuffle=True)
        )
        for epoch in range(4)
    ]
    assert len(set(orders)) > 2
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_the_stamp_in_the_remedy_brings_a_touched_file_back(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", numbered(0, 2))
    (before,) = open_sources(path)
    os.utime(path, (1, 1))
    (touched,) = open_sources(path)
    assert touched.identities != before.identities
    seconds = before.identities["a.jsonl"].partition("@")[2]
    os.system(f"touch -d @{seconds} {path}")  # what the message tells the user to do
    (restored,) = open_sources(path)
    assert restored.identities == before.identities


def test_held_out_examples_are_chosen_by_their_text_and_never_trained_on(tmp_path: Path) -> None:
    rows = numbered(0, 2000)
    sources = open_sources(write_rows(tmp_path / "a.jsonl", rows))
    held_out, excluded = hold_out(sources, share=0.05, limit=20, seed=1)
    assert len(held_out) == len(excluded) == 20
    # A copy under another name, at another place, among other rows.
    renamed = open_sources(write_rows(tmp_path / "b.jsonl", rows[:900][::-1] + rows))
    kept = read(renamed, excluded)
    assert not {text_hash(example) for example in kept} & excluded
    assert {example.completion for example in kept} | {example.completion for example in held_out} == {
        row["text"] for row in rows
    }
    again, same = hold_out(open_sources(tmp_path / "a.jsonl"), share=0.05, limit=20, seed=1)
    assert (again, same) == (held_out, excluded)
    assert hold_out(sources, share=0.05, limit=20, seed=2)[1] != excluded


def test_a_small_source_gives_its_share_and_every_source_some(tmp_path: Path) -> None:
    small = write_rows(tmp_path / "small.jsonl", numbered(0, 400))
    large = write_rows(tmp_path / "large.jsonl", numbered(5000, 1600))
    held_out, _ = hold_out(open_sources(small, large), share=0.05, limit=40, seed=0)
    of_small = sum(example.row_id.startswith("s0:") for example in held_out)
    assert 4 <= of_small <= 12
    assert len(held_out) <= 40
    few, _ = hold_out(open_sources(small), share=0.05, limit=1000, seed=0)
    assert 8 <= len(few) <= 36


def test_chats_and_prompts_have_hashes_of_their_own() -> None:
    examples = [
        Example("r", "a", "bc"),
        Example("r", "ab", "c"),
        Example("r", "", "", messages=({"role": "user", "content": "abc"},)),
        Example("r", "", "", messages=({"role": "assistant", "content": "abc"},)),
    ]
    hashes = [text_hash(example) for example in examples]
    assert all(one != other for one, other in pairwise(hashes))
    assert text_hash(Example("elsewhere", "a", "bc", reward=1.0)) == hashes[0]
