"""`metrics.jsonl`: the metrics of a run on the local disk, whatever happens to the tracking server.

One line a call, flushed at once: `{"step": 10, "time": 1712.5, "train/loss": 2.1, ...}`. The file is strict
JSON: a NaN or infinite value is `null` there, and named with its value under `nonfinite`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE_NAME = "metrics.jsonl"


class MetricsFile:
    """Appends metrics to a file, one JSON object a line.

    Args:
        path: the file; its folder is created where absent.
        resume_step: optimizer step at which the run goes on. Lines of later steps (from before the
            interruption) are cut off, as is a line that a crash left unfinished. None starts a new file.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None and self.path.exists():
            _cut_after(self.path, resume_step)
            mode = "a"
        else:
            mode = "w"
        self._file = open(self.path, mode, encoding="utf-8")  # noqa: SIM115 - closed by close()

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
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; a second call changes nothing."""
        self._file.close()


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
