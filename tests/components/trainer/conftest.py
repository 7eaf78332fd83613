"""Makes the fixtures of this folder known."""

from conftest_trainer import build

__all__ = ["build"]
