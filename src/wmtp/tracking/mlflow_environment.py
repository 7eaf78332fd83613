"""How MLflow is to behave in this process. Imported with the package, since MLflow reads it when imported."""

from __future__ import annotations

import logging
import os

# Nothing is sent anywhere but to the tracking store.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# The defaults (7 retries, 120 s each) would hold up the end of a run for minutes when a server has died.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
# It draws on the terminal that this project draws on.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

for _name in (
    "mlflow.store.db.utils",
    "mlflow.store.model_registry.abstract_store",
    "alembic",
    "alembic.runtime.migration",
    "mlflow.tracking.fluent",
):
    logging.getLogger(_name).setLevel(logging.WARNING)
