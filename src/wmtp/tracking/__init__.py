"""Tracking: MLflow, the local metrics file, and what a person sees on the console."""

from wmtp.tracking.base import (
    RunStatus,
    Tracker,
    TrackingWarning,
    experiment_name,
    flatten_params,
    git_commit,
)
from wmtp.tracking.composite import CompositeTracker, create_mlflow_manager, create_tracker
from wmtp.tracking.console import PhaseDisplay, ProgressDisplay
from wmtp.tracking.metrics_file import METRICS_FILE_NAME, MetricsFile, read_metrics

__all__ = [
    "METRICS_FILE_NAME",
    "CompositeTracker",
    "MetricsFile",
    "PhaseDisplay",
    "ProgressDisplay",
    "RunStatus",
    "Tracker",
    "TrackingWarning",
    "create_mlflow_manager",
    "create_tracker",
    "experiment_name",
    "flatten_params",
    "git_commit",
    "read_metrics",
]
