"""Checks what no linter does: module length, and that no address or machine path was committed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

MAX_LINES = 400
ROOT = Path(__file__).parents[1]
# Written in pieces, so that this file does not match itself.
FORBIDDEN = re.compile(
    "|".join(("pyth" + "onhosted", "py" + r"pi\.org", "npm" + r"js\.org", "deb" + r"\.debian", "/wo" + "rk/"))
)


def main() -> int:
    """Return 1 and say what is wrong, or 0."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    problems = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if not path.is_file() or path.suffix in {".png", ".ico"}:
            continue
        text = path.read_text(encoding="utf-8")
        if name.startswith("src/") and path.suffix == ".py" and text.count("\n") > MAX_LINES:
            problems.append(f"{name}: {text.count(chr(10))} lines; find a seam, {MAX_LINES} is the limit")
        problems += [
            f"{name}:{number}: address of a registry, or a path of one machine"
            for number, line in enumerate(text.splitlines(), 1)
            if FORBIDDEN.search(line)
        ]
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
