"""The local metrics file: complete, strict JSON, cut exactly at a resume."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from pathlib import Path

import pytest

from wmtp.tracking.metrics_file import MetricsFile, read_metrics


def _write(path: Path, steps: list[int], **options: int) -> None:
    file = MetricsFile(path, **options)
    for step in steps:
        file.log_metrics({"train/loss": step / 3}, step)
    file.close()


def test_values_come_back_exactly_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep/metrics.jsonl"
    _write(path, [1, 2, 3])
    rows = read_metrics(path)
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0)]
    assert abs(rows[0]["time"] - time.time()) < 60


def test_the_file_is_strict_json_also_with_nan(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m")
    file.log_metrics({"a": math.nan, "b": -math.inf, "c": 1}, 4)
    file.close()
    row = json.loads((tmp_path / "m").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row["a"] is None
    assert row["c"] == 1.0
    read = read_metrics(tmp_path / "m")[0]
    assert math.isnan(read["a"])
    assert read["b"] == -math.inf
    assert "nonfinite" not in read


def test_each_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m")
    for step in range(3):
        file.log_metrics({"x": 1.0}, step)
        assert len(read_metrics(tmp_path / "m")) == step + 1
    file.close()


def test_a_resume_appends_and_cuts_later_steps(tmp_path: Path) -> None:
    path = tmp_path / "m"
    _write(path, [10, 20, 20, 30, 40])
    _write(path, [25, 35], resume_step=20)
    assert [row["step"] for row in read_metrics(path)] == [10, 20, 20, 25, 35]


def test_a_resume_of_a_resume_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "m"
    _write(path, [1, 2, 3, 4])
    _write(path, [3, 4, 5], resume_step=2)
    _write(path, [4, 5, 6], resume_step=3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "train/lo', b'{"step": 2, "time": 1.0}', b"\x00\xff\n", b"[1]\n"]
)
def test_an_unfinished_line_is_cut_at_resume(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "m"
    _write(path, [1, 2])
    with path.open("ab") as file:
        file.write(torn)
    _write(path, [3], resume_step=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    assert path.read_bytes().count(b"\n") == 3


def test_a_resume_without_a_file_starts_one_and_a_new_run_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "m"
    _write(path, [5], resume_step=4)
    _write(path, [1])
    assert [row["step"] for row in read_metrics(path)] == [1]


def _write_forever(path: Path) -> None:
    file = MetricsFile(path)
    for step in range(10**9):
        file.log_metrics({"x": float(step)}, step)


def test_a_killed_process_loses_at_most_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "m"
    child = multiprocessing.get_context("fork").Process(target=_write_forever, args=(path,))
    child.start()
    time.sleep(0.2)
    child.kill()
    child.join(10)
    num_lines = path.read_bytes().count(b"\n")
    steps = [row["step"] for row in read_metrics(path)]
    assert num_lines > 10
    assert steps == list(range(len(steps)))
    assert len(steps) >= num_lines
