"""Pools of both kinds of unprivileged user, for the tests of untrusted programs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from wmtp.execution.pool import _Pool


@pytest.fixture(params=["own", "mapped"])
def pool(request: pytest.FixtureRequest) -> Iterator[_Pool]:
    """A pool of either kind of unprivileged user: a real one, taken by root, and a mapped one."""
    if request.param == "own" and os.geteuid() != 0:
        pytest.skip("only root can take another user's id")
    pool = _Pool("bubblewrap", user=request.param, has_filter=True)
    yield pool
    pool.close()
