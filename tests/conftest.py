"""Settings every test shares: one thread a process (pytest-xdist runs several), no network; an S3 server."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from s3_server import S3Server, run_s3_server

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give each test the same random state whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with an empty bucket, started where a test first asks for it."""
    with run_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server
