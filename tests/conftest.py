"""Settings every test shares: one thread a process (pytest-xdist runs several), no network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give each test the same random state whatever ran before it."""
    torch.manual_seed(0)
