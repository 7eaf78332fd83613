"""The shape of every component: built from its settings, set up once, then run.

A component's constructor takes its settings and nothing else. What it works on (models, batches, folders)
arrives in a context: a dataclass of its kind, defined beside the component, so that a missing piece is a type
error and not a `KeyError` an hour into a run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

ContextT = TypeVar("ContextT")
ResultT = TypeVar("ResultT")


class Component(ABC, Generic[ContextT, ResultT]):
    """One replaceable part of a run."""

    def setup(self, context: ContextT) -> None:
        """Prepare what `run` needs; called once, before the first `run`."""

    @abstractmethod
    def run(self, context: ContextT) -> ResultT:
        """Do the work of the component and return its result."""
