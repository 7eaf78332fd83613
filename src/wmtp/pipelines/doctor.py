"""`wmtp doctor`: what works on this machine, what does not, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from wmtp.pipelines.doctor_check import Check, CheckStatus, run_bounded
from wmtp.pipelines.doctor_machine import check_gpu, check_machine, check_packages
from wmtp.pipelines.doctor_places import check_caches, check_output
from wmtp.pipelines.doctor_s3 import check_s3
from wmtp.pipelines.doctor_services import check_hub, check_isolation, check_mlflow
from wmtp.settings import Config


def run_doctor(config: Config, *, write_probe: bool = False) -> Iterator[Check]:
    """Look at everything, one group after the other, and yield each group's lines when it is done.

    Every group has an end in time; what hangs becomes a line that says so.

    Args:
        config: where runs happen.
        write_probe: write a probe to `s3.bucket` even where no results go there.
    """
    groups: list[tuple[str, str, float, Callable[[], Iterable[Check]]]] = [
        ("machine", "machine", 20.0, check_machine),
        ("gpu", "devices", 60.0, lambda: check_gpu(config)),
        ("packages", "required", 20.0, lambda: check_packages(config)),
        ("output", "paths.output", 20.0, lambda: check_output(config)),
        ("s3", "access", 90.0, lambda: check_s3(config, probe="bucket" if write_probe else "results")),
        ("mlflow", "store", 30.0, lambda: check_mlflow(config)),
        ("hub", "access", 20.0, lambda: check_hub(config)),
        ("sandbox", "isolation", 90.0, check_isolation),
        ("caches", "caches", 30.0, check_caches),
    ]
    for group, subject, limit_s, checks in groups:
        yield from run_bounded(group, subject, checks, limit_s=limit_s)


def worst(checks: Iterable[Check]) -> CheckStatus:
    """The status of the whole: the worst of its lines."""
    found = {check.status for check in checks}
    order: tuple[CheckStatus, ...] = ("broken", "warning")
    return next((status for status in order if status in found), "works")
