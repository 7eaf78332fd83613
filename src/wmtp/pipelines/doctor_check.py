"""One line of the doctor's report, and running a check that may hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from wmtp.exceptions import WmtpError

CheckStatus = Literal["works", "warning", "broken"]


@dataclass(frozen=True, slots=True)
class Check:
    """What was found of one thing.

    Attributes:
        group: `machine`, `gpu`, `packages`, `output`, `s3`, `mlflow`, `hub`, `sandbox` or `caches`.
        subject: what was looked at.
        status: `works`; `warning`, which does not stop a run; `broken`.
        detail: what was found.
        remedy: what to do; empty where nothing has to be done.
    """

    group: str
    subject: str
    status: CheckStatus
    detail: str
    remedy: str = ""


def run_bounded(
    group: str, subject: str, checks: Callable[[], Iterable[Check]], *, limit_s: float
) -> list[Check]:
    """Run checks in a thread and take what they have found within the time.

    What hangs (a dead network disk, a driver that does not answer) is left behind in its thread, which does
    not keep the program from ending.

    Args:
        group: of the line about a check that failed or did not end.
        subject: likewise.
        checks: yields lines.
        limit_s: seconds for all of them.
    """
    found: list[Check] = []

    def collect() -> None:
        try:
            for check in checks():
                found.append(check)
        except WmtpError as error:
            found.append(Check(group, subject, "broken", error.message, error.remedy or ""))
        # The report goes on whatever a single check meets: this is where faults of the machine come out.
        except Exception as error:
            what = f"the check itself failed: {type(error).__name__}: {first_line(error)}"
            found.append(Check(group, subject, "broken", what, "report it with this line"))

    thread = threading.Thread(target=collect, name=f"doctor-{group}", daemon=True)
    begin = time.monotonic()
    thread.start()
    thread.join(limit_s)
    lines = list(found)
    if thread.is_alive():
        what = f"no answer within {time.monotonic() - begin:.0f} s"
        remedy = "something it uses hangs: a network disk, a driver, a server"
        lines.append(Check(group, subject, "broken", what, remedy))
    return lines


def size_text(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
