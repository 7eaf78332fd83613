"""Building trackers from addresses and from a config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.tracking.composite import CompositeTracker
from wmtp.tracking.metrics_file import METRICS_FILE_NAME, MetricsFile
from wmtp.tracking.object_store import OpenStore

if TYPE_CHECKING:
    from wmtp.settings import Config
    from wmtp.tracking.mlflow_tracker import MLflowManager


def create_tracker(
    run_dir: str | os.PathLike[str],
    *,
    experiment: str,
    tracking_uri: str,
    run_name: str | None = None,
    run_id: str | None = None,
    resume_step: int | None = None,
    registry_uri: str | None = None,
    artifact_location: str | None = None,
    tags: Mapping[str, str] | None = None,
    open_store: OpenStore | None = None,
) -> CompositeTracker:
    """Build the tracker of a run: `<run_dir>/metrics.jsonl` and an MLflow run.

    Args:
        run_dir: folder of the run.
        experiment: see `experiment_name`.
        tracking_uri: SQLite address, server address, a folder (SQLite inside it), or `s3://bucket/prefix`.
        run_name: shown by MLflow.
        run_id: continue this MLflow run.
        resume_step: optimizer step at which the run goes on; what was recorded of later steps is taken back,
            and what MLflow lacks of earlier ones is sent from `metrics.jsonl`. None: new run.
        registry_uri: MLflow's model registry; default: the tracking store.
        artifact_location: see `MLflowManager`.
        tags: set on the run.
        open_store: gives access to S3, where one of the addresses is there.

    Raises:
        UserInputError: the tracking store cannot be used (from the start; later failures are warnings).
    """
    # Imported here: MLflow takes a second to import, and commands that do not track should not wait for it.
    from wmtp.tracking.mlflow_tracker import MLflowManager

    manager = MLflowManager(
        tracking_uri,
        experiment=experiment,
        run_name=run_name,
        run_id=run_id,
        resume_step=resume_step,
        registry_uri=registry_uri,
        artifact_location=artifact_location,
        tags=tags,
        open_store=open_store,
    )
    metrics_file = MetricsFile(Path(run_dir) / METRICS_FILE_NAME, resume_step=resume_step)
    tracker = CompositeTracker(metrics_file, manager)
    if resume_step is not None:
        tracker.restore_metrics(up_to_step=resume_step)
    return tracker


def create_mlflow_manager(
    config: Config,
    *,
    experiment: str = "mtp",
    run_name: str | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    open_store: OpenStore | None = None,
) -> MLflowManager:
    """Build the MLflow tracker that a config describes; without `mlflow.tracking_uri` it is `mlflow/` of the
    output.

    Raises:
        UserInputError: the tracking store cannot be used; it is on S3 and no `open_store` is given.
    """
    from wmtp.tracking.mlflow_tracker import MLflowManager

    return MLflowManager(
        tracking_address(config),
        experiment=experiment,
        run_name=run_name,
        run_id=run_id,
        registry_uri=config.mlflow.registry_uri,
        artifact_location=config.mlflow.artifact_location,
        tags=tags,
        open_store=open_store,
    )


def tracking_address(config: Config) -> str:
    """`mlflow.tracking_uri`, or the folder `mlflow` of the output."""
    return config.mlflow.tracking_uri or f"{config.paths.output.rstrip('/')}/mlflow"
