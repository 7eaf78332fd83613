"""Real files of every container and compression, whole and damaged."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from wmtp.components.data.reading import BadRows, Row, list_data_files, read_rows
from wmtp.exceptions import DataError

ROWS = [{"text": f"line {number} \u2028 é", "reward": number / 2} for number in range(5)]


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet_bytes(rows: list[dict[str, Any]], folder: Path) -> bytes:
    parquet.write_table(pa.Table.from_pylist(rows), folder / "scratch")
    content = (folder / "scratch").read_bytes()
    (folder / "scratch").unlink()
    return content


def read(path: Path) -> list[Row]:
    return [row for file in list_data_files(str(path)) for row in read_rows(file)]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("container", [".jsonl", ".json", ".parquet"])
def test_every_container_and_compression_gives_the_same_rows(
    tmp_path: Path, container: str, compression: str
) -> None:
    content = {
        ".jsonl": json_lines(ROWS),
        ".json": json.dumps(ROWS, indent=1).encode(),
        ".parquet": parquet_bytes(ROWS, tmp_path),
    }[container]
    packed = {
        "": content,
        ".gz": gzip.compress(content),
        ".zst": zstandard.ZstdCompressor().compress(content),
    }[compression]
    path = tmp_path / f"rows{container}{compression}"
    path.write_bytes(packed)
    assert [row.fields for row in read(path)] == ROWS
    # What a file is called does not matter, only what is in it.
    renamed = path.rename(tmp_path / "rows.bin")
    assert [row.fields for row in read(renamed)] == ROWS


def test_lines_are_those_an_editor_shows(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\n   \n{"a": 3}')
    assert [(row.row_id, row.fields["a"]) for row in read(lines)] == [
        ("rows.jsonl:1", 1),
        ("rows.jsonl:3", 2),
        ("rows.jsonl:5", 3),
    ]
    array = tmp_path / "rows.json"
    array.write_text('[\n{"a": 1},\n\n  {"a":\n 2}, {"a": 3}\n]\n')
    assert [(row.line, row.fields["a"]) for row in read(array)] == [(2, 1), (4, 2), (5, 3)]


def test_rows_that_are_not_objects_come_with_their_problem(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1, 2]\n"\xff"\n{"a": 2}\n')
    rows = read(path)
    assert [row.line for row in rows if row.problem is None] == [1, 5]
    problems = {row.line: row.problem for row in rows if row.problem is not None}
    assert "not valid JSON" in problems[2]
    assert "not a JSON object but list" in problems[3]
    assert "not valid JSON" in problems[4]


def test_null_fields_are_as_if_absent(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet_bytes([{"text": "a", "reward": None}, {"text": "b", "reward": 1.0}], tmp_path))
    assert [row.fields for row in read(path)] == [{"text": "a"}, {"text": "b", "reward": 1.0}]


def test_zstandard_files_of_several_frames_are_read_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    compressor = zstandard.ZstdCompressor()
    path.write_bytes(b"".join(compressor.compress(json_lines([row])) for row in ROWS))
    assert [row.fields for row in read(path)] == ROWS


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_truncated_file_is_an_error_and_not_a_short_dataset(tmp_path: Path, compression: str) -> None:
    content = json_lines([{"text": f"{number} " * 50} for number in range(2000)])
    whole = gzip.compress(content) if compression == "gz" else zstandard.ZstdCompressor().compress(content)
    path = tmp_path / f"rows.jsonl.{compression}"
    path.write_bytes(whole[: len(whole) - 20])
    with pytest.raises(DataError, match=rf"rows.jsonl.{compression}: cannot be read after line \d+"):
        read(path)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet_bytes(ROWS, tmp_path)[:-50])
    with pytest.raises(DataError, match=r"rows.parquet: cannot be read"):
        read(path)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', 3),
        ('[\n{"a": 1}\n', 2),
        ('[{"a": 1} {"a": 2}]', 1),
        ("[", 1),
        ("[] []", 1),
    ],
)
def test_a_broken_json_list_names_the_line(tmp_path: Path, content: str, line: int) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError, match=f"rows.json:{line}: the JSON list is not valid"):
        read(path)


def test_a_directory_gives_its_data_files_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("c.jsonl", "b/x.jsonl.gz", "a.jsonl"):
        content = json_lines([{"name": name}])
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for name in ("README.md", "dataset_info.json", ".hidden.jsonl", ".cache/x.jsonl", "_part.jsonl"):
        (tmp_path / name).write_text("not data")
    rows = read(tmp_path)
    assert [row.row_id for row in rows] == ["a.jsonl:1", "b/x.jsonl.gz:1", "c.jsonl:1"]
    assert [row.fields["name"] for row in rows] == ["a.jsonl", "b/x.jsonl.gz", "c.jsonl"]


def test_urls_of_other_filesystems_work_as_paths_do() -> None:
    import fsspec

    with fsspec.open("memory://folder/rows.jsonl", "wb") as file:
        file.write(json_lines(ROWS))
    for source in ("memory://folder/rows.jsonl", "memory://folder"):
        files = list_data_files(source)
        assert [(file.name, [row.fields for row in read_rows(file)]) for file in files] == [
            ("rows.jsonl", ROWS)
        ]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing.jsonl' does not exist"):
        list_data_files(str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="holds no data files; it holds nothing"):
        list_data_files(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds notes.txt"):
        list_data_files(str(tmp_path))
    with pytest.raises(DataError, match="nosuchscheme"):
        list_data_files("nosuchscheme://bucket/x")


def test_a_place_that_cannot_be_reached_is_said(tmp_path: Path) -> None:
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match=r"loop.jsonl"):
        list_data_files(str(loop))
    vanished = tmp_path / "rows.jsonl"
    vanished.write_bytes(json_lines(ROWS))
    (file,) = list_data_files(str(vanished))
    vanished.unlink()
    with pytest.raises(DataError, match=r"rows.jsonl: cannot be read after line 0"):
        list(read_rows(file))


def test_bad_rows_fail_at_once_or_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="a:3: no good"):
        BadRows("fail").report("a:3", "no good")
    bad_rows = BadRows("skip")
    bad_rows.report("a:3", "no good")
    bad_rows.report("a:9", "worse")
    with caplog.at_level(logging.WARNING):
        bad_rows.warn("a")
    assert caplog.messages == ["a: skipped 2 bad row(s); the first: a:3: no good"]
