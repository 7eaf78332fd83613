"""Records that are appended, torn, and found again."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from wmtp.evaluation.records import RecordFile, key_of, read_records, write_records


def test_what_was_appended_is_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    file = RecordFile(path)
    file.append({"a": 1}, {"a": 2})
    file.append({"text": "lone \udc80, line\u2028end, null \x00"})
    assert [record.get("a") for record in read_records(path)] == [1, 2, None]
    file.close()
    file.close()
    assert [*read_records(path)][2]["text"] == "lone \udc80, line\u2028end, null \x00"
    assert [*read_records(tmp_path / "absent.jsonl")] == []


@pytest.mark.parametrize("num_bytes", range(1, 24))
def test_a_torn_last_line_is_no_record_and_the_next_append_stands_by_itself(
    num_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, [{"a": 1}, {"a": 2, "b": "long enough"}])
    os.truncate(path, path.stat().st_size - num_bytes)
    assert [record["a"] for record in read_records(path)] == [1]
    file = RecordFile(path)
    file.append({"a": 3})
    file.close()
    assert [record["a"] for record in read_records(path)] == [1, 3]


def test_lines_that_are_damaged_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff\xfe\n[1]\n\n{"a": 2}\n{"a"\n')
    assert [record["a"] for record in read_records(path)] == [1, 2]


def test_keys_are_equal_for_equal_parts_alone() -> None:
    parts: list[tuple[object, ...]] = [
        (),
        ("",),
        ("a",),
        ("a", "b"),
        (["a", "b"],),
        ("ab",),
        (1,),
        (1.5,),
        (None,),
    ]
    assert len({key_of(*each) for each in parts}) == len(parts)
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


def write_until_killed(path: Path, number: int) -> None:
    file = RecordFile(path)
    while True:
        file.append({"number": number, "padding": "x" * (number % 997)})
        number += 1


def test_a_killed_writer_loses_no_whole_line_and_tears_at_most_one(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    source = random.Random(0)
    for _ in range(4):
        begin = sum(1 for _ in read_records(path))
        writer = os.fork()
        if writer == 0:
            write_until_killed(path, begin)
        while not path.exists() or sum(1 for _ in read_records(path)) == begin:
            time.sleep(0.01)
        time.sleep(source.random() / 10)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    numbers = [record["number"] for record in read_records(path)]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 100
