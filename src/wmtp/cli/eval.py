"""`python -m wmtp.cli.eval`: the same as `wmtp eval`."""

from __future__ import annotations

from wmtp.cli.evaluate import evaluate

if __name__ == "__main__":
    from wmtp.cli.app import run_command

    run_command(evaluate)
