"""What every tracker can do, and the small rules they share: names of experiments, flat parameters, code
version."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from wmtp.tracking.checkpoint_records import CheckpointRecord

RunStatus = Literal["finished", "failed", "interrupted"]

_MAX_EXPERIMENT_NAME = 500
_DATASET_ENDINGS = re.compile(r"(\.(jsonl|json|parquet))?(\.(gz|zst))?$")


class TrackingWarning(UserWarning):
    """Tracking does not work as asked; training goes on."""


class Tracker(Protocol):
    """Where a run's settings, metrics and files are recorded."""

    @property
    def run_id(self) -> str | None:
        """The id under which the run can be found and resumed; None where there is no such id."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings; nested mappings become dotted names."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of one optimizer step."""

    def log_artifact(self, path: str | os.PathLike[str], folder: str | None = None) -> None:
        """Record a file, or a folder with all it holds, under `folder` of the run's artifacts."""

    def log_model(self, name: str, path: str | os.PathLike[str], folder: str) -> None:
        """Record the files of a folder under `folder` of the artifacts and register them as the next version
        of the model `name`.
        """

    def log_checkpoint(
        self, step: int, *, uri: str, metrics: Mapping[str, float], manifest_sha256: str
    ) -> None:
        """Record a committed checkpoint as `checkpoints/step_{step}`.

        Args:
            step: finished updates.
            uri: where it is: an absolute path or `s3://...`.
            metrics: the last ones.
            manifest_sha256: of its manifest file, in hex.
        """

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record or replace tags."""

    def finish(self, status: RunStatus = "finished") -> None:
        """Close the run; further calls change nothing."""


class RemoteTracker(Protocol):
    """What a `CompositeTracker` hands on; each call may raise, and may be repeated after it has."""

    @property
    def run_id(self) -> str | None:
        """The id under which the run can be found and resumed."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See `Tracker`."""

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, time_ms: int | None = None) -> None:
        """See `Tracker`; `time_ms` is Unix time in milliseconds."""

    def restore_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Record what the run lacks of these rows of a metrics file."""

    def log_artifact(self, path: str | os.PathLike[str], folder: str | None = None) -> None:
        """See `Tracker`."""

    def log_model(self, name: str, path: str | os.PathLike[str], folder: str) -> None:
        """See `Tracker`."""

    def log_checkpoint(self, record: CheckpointRecord) -> None:
        """Record a committed checkpoint."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See `Tracker`."""

    def finish(self, status: RunStatus = "finished") -> None:
        """See `Tracker`."""


def experiment_name(algo: str, sources: Iterable[str]) -> str:
    """Name an experiment `mtp/{algo}/{dataset}`, the dataset being the sources' short names joined by `+`.

    `experiment_name("rho1-wmtp", ["mbpp", "data/own.jsonl.gz", "builtin:microcode"])` is
    `mtp/rho1-wmtp/mbpp+own+microcode`.
    """
    dataset = "+".join(_short_name(source) for source in sources)
    return f"mtp/{algo}/{dataset}"[:_MAX_EXPERIMENT_NAME]


def flatten_params(params: Mapping[str, Any], *, max_key: int = 250, max_value: int = 6000) -> dict[str, str]:
    """Turn nested settings into `{"loss.lambda": "0.5", ...}` that fits a tracking server's limits.

    Lists become JSON. Names keep letters, digits and `_ - . space / :`, other signs become `_`. What is
    longer than the limit (in characters) is cut and ends in `...`.
    """
    flat: dict[str, str] = {}
    for key, value in _leaves(params, ""):
        name = _cut(re.sub(r"[^\w\-. /:]", "_", key), max_key)
        flat[name] = _cut(value if isinstance(value, str) else json.dumps(value, default=str), max_value)
    return flat


def git_commit(folder: str | os.PathLike[str] | None = None) -> str | None:
    """Commit of the checkout this package runs from, with `-dirty` where files were changed; None outside of
    one.

    Args:
        folder: a folder with the package's files; default: this package's own.
    """
    folder = Path(__file__).parent if folder is None else Path(folder)
    # An installed copy can lie in somebody else's repository: only files that git tracks count.
    if _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changes else commit


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _short_name(source: str) -> str:
    name = source.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return _DATASET_ENDINGS.sub("", name) or name


def _leaves(value: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
