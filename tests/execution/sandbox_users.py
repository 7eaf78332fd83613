"""Which users this machine lets a sandbox have, for tests that want each of them."""

from __future__ import annotations

import os

import pytest

from wmtp.execution import check_sandbox
from wmtp.execution.pool import User


def kind_in_force() -> User:
    """The one that programs get here; fails, and does not skip, where no sandbox works."""
    status = check_sandbox()
    assert status.user != "none", status
    return status.user


def needs_kind(user: User) -> None:
    """Skip where programs cannot run as this kind of user: only root that may mount can give ids away."""
    if user == "own" and kind_in_force() != "own":
        why = "root may not mount here" if os.geteuid() == 0 else "only root can take another user's id"
        pytest.skip(why)
