"""Each step once: what a run's metric history may hold when the run goes on, and what it lacks.

A run that is killed has logged steps after its last checkpoint, and the resumed one logs them again. MLflow
keeps both. In a database the rows of later steps are deleted at the resume. A server deletes no metrics;
there, what is known with the same value is not logged again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

# These measure the machine: no two runs agree on them, so the first value of a step stays.
MACHINE_METRICS = frozenset(
    {
        "train/tokens_per_second",
        "train/mfu",
        "train/memory_peak_gib",
        "train/data_wait_ratio",
        "train/seconds_per_step",
    }
)
_NOT_METRICS = ("step", "time")

# MLflow's latest value of a metric is the one of the highest step, then time, then value.
_LATEST = """
INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid)
SELECT key, value, timestamp, step, is_nan, run_uuid FROM (
  SELECT key, value, timestamp, step, is_nan, run_uuid,
    ROW_NUMBER() OVER (PARTITION BY key ORDER BY step DESC, timestamp DESC, value DESC) AS place
  FROM metrics WHERE run_uuid = :run_id
) AS ranked WHERE place = 1
"""


class MetricHistory:
    """What a run on a server had logged when it was resumed, to tell what need not be logged again."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._values: dict[tuple[str, int], set[float | None]] = {}
        for metric in metrics:
            self._values.setdefault((metric.key, metric.step), set()).add(_comparable(metric.value))

    def is_known(self, key: str, step: int, value: float) -> bool:
        """Whether logging this would be a second entry of the same."""
        values = self._values.get((key, step))
        return values is not None and (key in MACHINE_METRICS or _comparable(value) in values)

    def has_step(self, key: str, step: int) -> bool:
        """Whether there is any value of this metric at this step."""
        return (key, step) in self._values


def read_history(client: MlflowClient, run_id: str, *, from_step: int = 0) -> MetricHistory:
    """The metrics of a run at `from_step` and later."""
    keys = client.get_run(run_id).data.metrics
    return MetricHistory(
        metric
        for key in keys
        for metric in client.get_metric_history(run_id, key)
        if metric.step >= from_step
    )


def delete_later_metrics(database_uri: str, run_id: str, step: int) -> None:
    """Delete a run's metrics of steps after `step` from a database that MLflow keeps its runs in."""
    engine = create_engine(database_uri, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(
            text("DELETE FROM metrics WHERE run_uuid = :run_id AND step > :step"),
            {"run_id": run_id, "step": step},
        )
        connection.execute(text("DELETE FROM latest_metrics WHERE run_uuid = :run_id"), {"run_id": run_id})
        connection.execute(text(_LATEST), {"run_id": run_id})


def missing_metrics(history: MetricHistory, rows: Sequence[Mapping[str, float]]) -> list[Metric]:
    """The metrics of these rows of a metrics file that a run has no value of, with the time they had."""
    return [
        Metric(key, value, round(row["time"] * 1000), int(row["step"]))
        for row in rows
        for key, value in row.items()
        if key not in _NOT_METRICS and not history.has_step(key, int(row["step"]))
    ]


def _comparable(value: float) -> float | None:
    """NaN as None, and infinities as MLflow's databases store them."""
    if math.isnan(value):
        return None
    return math.copysign(sys.float_info.max, value) if math.isinf(value) else value
