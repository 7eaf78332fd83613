"""Why programs did not pass, in a few words that can be counted."""

from __future__ import annotations

import builtins
import re
from typing import Final

_KINDS: Final = {
    "failed": "wrong value",
    "timeout": "timeout",
    "memory": "out of memory",
    "killed": "killed",
    "unverified": "unverified",
}
# A program may name its exceptions as it likes; only names that it did not choose are shown.
_EXCEPTIONS: Final = frozenset(
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
)


def failure_kind(status: str, message: str) -> str:
    """Return what kind of failure a verdict is, `passed` for none.

    Args:
        status: of the verdict.
        message: of the verdict; its last line names the exception of an `error`.
    """
    if status != "error":
        return _KINDS.get(status, status)
    last = message.strip().rpartition("\n")[2]
    last = re.sub(r"^case \d+ of \d+: ", "", last)
    name = re.match(r"(\w+)(?::|$)", last)
    if name is not None and name[1] in _EXCEPTIONS:
        return name[1]
    return "bad exit status" if last.startswith("exit status") else "other exception"
