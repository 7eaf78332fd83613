"""Pools of both kinds of unprivileged user, for the tests of untrusted programs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sandbox_users import needs_kind

from wmtp.execution.pool import _Pool


@pytest.fixture(params=["own", "mapped"])
def pool(request: pytest.FixtureRequest) -> Iterator[_Pool]:
    """A pool of either kind of unprivileged user: a real one, taken by root, and a mapped one."""
    needs_kind(request.param)
    pool = _Pool("bubblewrap", user=request.param, has_filter=True)
    yield pool
    pool.close()
