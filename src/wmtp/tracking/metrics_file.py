"""`metrics.jsonl`: the metrics of a run on the local disk, whatever happens to the tracking server.

One line a call, written at once: `{"step": 10, "time": 1712.5, "train/loss": 2.1, ...}`. The file is strict
JSON: a NaN or infinite value is `null` there, and named with its value under `nonfinite`.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from wmtp.exceptions import UserInputError
from wmtp.tracking.base import TrackingWarning

METRICS_FILE_NAME = "metrics.jsonl"


class MetricsFile:
    """Appends metrics to a file, one JSON object a line.

    While the disk does not take a line (it is full, read-only, gone), lines are kept in memory, with one
    warning, and written in order as soon as it does; a line that was written in part is taken back.

    Args:
        path: the file; its folder is created where absent.
        resume_step: optimizer step at which the run goes on. Lines of later steps (from before the
            interruption) are cut off, as is a line that a crash left unfinished. None starts a new file.

    Raises:
        UserInputError: the file cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self._waiting: deque[bytes] = deque()
        self._has_warned = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is not None and self.path.exists():
                _cut_after(self.path, resume_step)
            # Unbuffered: what is written is the operating system's, and a failure is that of this line.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
            if resume_step is None:
                self._file.truncate(0)
            self._end = self._size()
        except OSError as error:
            raise UserInputError(
                f"Metrics cannot be written to {self.path}: {error.strerror or error}",
                remedy="Check the permissions and the free space there, or set paths.output to another place "
                "(paths.work where that is on S3).",
            ) from error

    @property
    def num_waiting(self) -> int:
        """Lines that the disk did not take so far."""
        return len(self._waiting)

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, time_ms: int | None = None) -> None:
        """Write one line and hand it to the operating system, so that a killed process loses none.

        `time_ms` is Unix time in milliseconds; default: now.
        """
        time_ms = int(time.time() * 1000) if time_ms is None else time_ms
        row: dict[str, Any] = {"step": step, "time": time_ms / 1000}
        nonfinite = {}
        for name, value in metrics.items():
            number = float(value)
            row[name] = number if math.isfinite(number) else None
            if not math.isfinite(number):
                nonfinite[name] = repr(number)
        if nonfinite:
            row["nonfinite"] = nonfinite
        self._waiting.append(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        problem = self._write_waiting()
        if problem is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self.path} cannot be written ({problem}); training goes on, and what is missing there is "
                "written when that is possible again.",
                TrackingWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        """Close the file, with a warning where lines were not written; a second call changes nothing."""
        if self._file.closed:
            return
        problem = self._write_waiting()
        try:
            self._file.close()
        except OSError as error:
            # Network file systems may say only now that they did not keep what they took.
            problem = problem or error.strerror or str(error)
        if problem is not None:
            warnings.warn(
                f"{self.path} is not complete ({problem}): the last {self.num_waiting} rows are lost.",
                TrackingWarning,
                stacklevel=2,
            )

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _write_waiting(self) -> str | None:
        """Write the lines that wait; what hinders it, if anything does."""
        try:
            while self._waiting:
                self._write_line(self._waiting[0])
                self._waiting.popleft()
                self._end = self._size()
        except OSError as error:
            return error.strerror or str(error)
        return None

    def _write_line(self, line: bytes) -> None:
        if self._size() > self._end:
            # What an attempt before this one wrote of a line.
            self._file.truncate(self._end)
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            # At once, for whoever reads the file; if it fails, the next attempt does it.
            with suppress(OSError):
                self._file.truncate(self._end)
            raise


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read a metrics file: one dict a line, with `step` and `time`, NaN and infinities as floats.

    An unfinished last line, as a crash leaves it, is left out.
    """
    rows = []
    for line in Path(path).read_bytes().splitlines():
        row = _parse(line)
        if row is None:
            break
        nonfinite = row.pop("nonfinite", {})
        rows.append({**row, **{name: float(value) for name, value in nonfinite.items()}})
    return rows


def _cut_after(path: Path, step: int) -> None:
    content = path.read_bytes()
    end = 0
    for line in content.splitlines(keepends=True):
        row = _parse(line)
        if row is None or not line.endswith(b"\n") or row["step"] > step:
            break
        end += len(line)
    if end < len(content):
        # Steps only grow within the kept part, so that what is cut is one piece at the end.
        os.truncate(path, end)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
