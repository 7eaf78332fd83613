"""Running untrusted programs: `run_program`, `run_programs`, `check_sandbox`."""

from wmtp.execution.outputs import outputs_match
from wmtp.execution.pool import check_sandbox, run_program, run_programs
from wmtp.execution.results import Isolation, ProgramJob, ProgramResult, SandboxStatus, Status

__all__ = [
    "Isolation",
    "ProgramJob",
    "ProgramResult",
    "SandboxStatus",
    "Status",
    "check_sandbox",
    "outputs_match",
    "run_program",
    "run_programs",
]
