"""Tracking: MLflow, the local metrics file, and what a person sees on the console."""

from wmtp.tracking import mlflow_environment as mlflow_environment
from wmtp.tracking.base import (
    RunStatus,
    Tracker,
    TrackingWarning,
    experiment_name,
    flatten_params,
    git_commit,
)
from wmtp.tracking.checkpoint_records import CheckpointRecord
from wmtp.tracking.composite import CompositeTracker
from wmtp.tracking.console import PhaseDisplay, ProgressDisplay, StageDisplay
from wmtp.tracking.create import create_mlflow_manager, create_tracker, tracking_address
from wmtp.tracking.lookup import checkpoints_of, download_model_artifact, resolve_run_uri
from wmtp.tracking.metrics_file import METRICS_FILE_NAME, MetricsFile, read_metrics
from wmtp.tracking.object_store import ObjectStore, OpenStore

__all__ = [
    "METRICS_FILE_NAME",
    "CheckpointRecord",
    "CompositeTracker",
    "MetricsFile",
    "ObjectStore",
    "OpenStore",
    "PhaseDisplay",
    "ProgressDisplay",
    "RunStatus",
    "StageDisplay",
    "Tracker",
    "TrackingWarning",
    "checkpoints_of",
    "create_mlflow_manager",
    "create_tracker",
    "download_model_artifact",
    "experiment_name",
    "flatten_params",
    "git_commit",
    "read_metrics",
    "resolve_run_uri",
    "tracking_address",
]
