"""Checkpoints as they are recorded in a run: tags `checkpoints/step_{n}`, each a small JSON object.

A tag, because it is in the run's own row: it can be searched for, is replaced when the step is saved again,
survives on every kind of store, and costs one call.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PREFIX = "checkpoints/step_"
# MLflow's limits: 8000 characters now, 5000 in older servers.
_MAX_LENGTH = 5000


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A committed checkpoint.

    Attributes:
        step: finished updates.
        uri: where it is: an absolute path or `s3://...`.
        metrics: the last ones at that step; an infinite or NaN one is left out.
        manifest_sha256: of its manifest file, in hex.
    """

    step: int
    uri: str
    metrics: dict[str, float]
    manifest_sha256: str

    def to_tag(self) -> tuple[str, str]:
        """Key and value of the tag; metrics that do not fit are left out, the last ones first."""
        metrics = {name: value for name, value in self.metrics.items() if math.isfinite(value)}
        value = self._dump(metrics)
        while len(value) > _MAX_LENGTH and metrics:
            metrics.popitem()
            value = self._dump(metrics)
        return f"{_PREFIX}{self.step}", value

    def _dump(self, metrics: Mapping[str, float]) -> str:
        row = {"step": self.step, "uri": self.uri, "manifest_sha256": self.manifest_sha256}
        return json.dumps({**row, "metrics": metrics}, ensure_ascii=False)


def checkpoint_records(tags: Mapping[str, str]) -> list[CheckpointRecord]:
    """The checkpoints among a run's tags, newest first; tags that somebody else wrote are left out."""
    records = [_parse(value) for key, value in tags.items() if key.startswith(_PREFIX)]
    found = [record for record in records if record is not None]
    return sorted(found, key=lambda record: record.step, reverse=True)


def _parse(value: str) -> CheckpointRecord | None:
    try:
        row: Any = json.loads(value)
        return CheckpointRecord(int(row["step"]), str(row["uri"]), row["metrics"], row["manifest_sha256"])
    except (ValueError, KeyError, TypeError):
        return None
