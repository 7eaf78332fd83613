"""What a run talks to besides S3: MLflow's store, the hub, and the sandbox."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from huggingface_hub import constants, get_token, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from wmtp.execution import check_sandbox
from wmtp.pipelines.doctor_check import Check, first_line
from wmtp.settings import Config
from wmtp.settings.redaction import redact_text
from wmtp.storage import PathResolver

_TIMEOUT_S = 5.0
_DATABASE = "mlflow.db"
_FREE = "set mlflow.tracking_uri to a place that works; metrics.jsonl is written in any case"


def check_mlflow(config: Config) -> Iterator[Check]:
    """Whether runs can be tracked: the store is opened for reading, or the server asked."""
    uri = config.mlflow.tracking_uri
    if uri is None:
        kind, resolved = PathResolver().resolve(config.paths.output)
        if kind not in ("local", "hub"):
            yield Check("mlflow", "store", "works", f"below {config.paths.output}, see {kind}")
            return
        folder = Path(config.paths.output if kind == "hub" else resolved).absolute() / "mlflow"
        yield _check_database(folder / _DATABASE)
        return
    scheme = urlsplit(uri).scheme
    if uri.startswith("sqlite:///"):
        yield _check_database(Path(uri.removeprefix("sqlite:///")).expanduser().absolute())
    elif scheme in ("", "file"):
        yield _check_database(Path(uri.removeprefix("file://")).expanduser().absolute() / _DATABASE)
    elif scheme in ("http", "https"):
        yield _check_server(uri)
    elif scheme == "s3":
        yield Check("mlflow", "store", "works", f"{uri}, see s3")
    else:
        yield from _check_client(uri)


def check_hub(config: Config) -> Iterator[Check]:
    """The hub: whether it may be asked, whether there is a token, and models that a run would need of it."""
    token = get_token()
    has_token = "there is none; models behind a licence need one (HF_TOKEN)"
    if token is not None:
        place = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "a login of the hub's library"
        has_token = f"there is one, from {place}"
    yield Check("hub", "token", "works", has_token)
    wanted = {
        key: path
        for key, path in _model_paths(config).items()
        if path is not None and PathResolver().resolve(path)[0] == "hub"
    }
    missing = [f"{path} ({key})" for key, path in wanted.items() if not _is_cached(path)]
    is_offline = constants.is_offline_mode()
    problem = "HF_HUB_OFFLINE is set" if is_offline else _ask_hub()
    if problem is None:
        yield Check("hub", "access", "works", f"{constants.ENDPOINT} answers")
    elif missing:
        remedy = "download them where there is a network, or give folders in paths.models"
        if is_offline:
            remedy = f"unset HF_HUB_OFFLINE, or {remedy}"
        detail = f"{problem}, and not in its cache: {', '.join(missing)}"
        yield Check("hub", "access", "broken", detail, remedy)
    elif is_offline:
        yield Check("hub", "access", "works", f"{problem}: only its cache is used")
    else:
        remedy = "nothing, as long as no hub id is used; HF_HUB_OFFLINE=1 saves waiting for it"
        yield Check("hub", "access", "warning", problem, remedy)


def check_isolation() -> Iterator[Check]:
    """The sandbox that generated programs run in: it is started once."""
    status = check_sandbox()
    if not status.available:
        detail = f"none works, so that programs are not run: {status.reason}"
        yield Check("sandbox", "isolation", "broken", detail, status.remedy)
        return
    own = "a user id of its own for each worker"
    user = own if status.user == "own" else "user nobody of a user namespace"
    if status.kind == "bubblewrap":
        detail = f"bubblewrap, without its system call filter, as {user}"
        yield Check("sandbox", "isolation", "warning", detail, "use a kernel with seccomp")
    else:
        detail = f"{status.kind}, as {user}: a program was run in it and saw nothing of this machine"
        yield Check("sandbox", "isolation", "works", detail)


def _check_database(path: Path) -> Check:
    """Open a SQLite store for reading; nothing is created or changed."""
    if not path.exists():
        nearest = next(folder for folder in path.parents if folder.exists())
        if nearest.is_dir() and os.access(nearest, os.W_OK):
            return Check("mlflow", "store", "works", f"{path} will be made by the first run")
        return Check("mlflow", "store", "broken", f"{path} cannot be made below {nearest}", _FREE)
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=_TIMEOUT_S)) as database:
            runs = database.execute("SELECT count(*) FROM runs").fetchone()[0]
            experiments = database.execute("SELECT count(*) FROM experiments").fetchone()[0]
    except sqlite3.Error as error:
        remedy = "give another file, or restore this one from a copy"
        return Check("mlflow", "store", "broken", f"{path} cannot be read: {error}", remedy)
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        return Check("mlflow", "store", "broken", f"{path} can be read and not written", _FREE)
    return Check("mlflow", "store", "works", f"{path}: {runs} runs in {experiments} experiments")


def _check_server(uri: str) -> Check:
    """Ask a server whether it is well, then for an experiment, which needs an account where there are any."""
    shown = redact_text(uri)
    parts = urlsplit(uri)
    plain = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
    try:
        with urllib.request.urlopen(f"{plain}/health", timeout=_TIMEOUT_S):
            pass
    except urllib.error.HTTPError as error:
        error.close()
        remedy = "check the address; a server of MLflow answers at <address>/health"
        return Check("mlflow", "server", "broken", f"{shown} answers {error.code} to /health", remedy)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        remedy = "start it, or check mlflow.tracking_uri; runs go on without it and write metrics.jsonl"
        return Check("mlflow", "server", "broken", f"{shown} cannot be reached: {reason}", remedy)
    request = urllib.request.Request(
        f"{plain}/api/2.0/mlflow/experiments/search",
        data=json.dumps({"max_results": 1}).encode(),
        headers={"Content-Type": "application/json", **_authorization(uri)},
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return Check("mlflow", "server", "broken", f"{shown} refuses access ({error.code})", remedy)
    except (OSError, ValueError) as error:
        return Check("mlflow", "server", "broken", f"{shown} gives no answer: {first_line(error)}", _FREE)
    return Check("mlflow", "server", "works", f"{shown} answers")


def _authorization(uri: str) -> dict[str, str]:
    """The header by which MLflow's own client would log in."""
    parts = urlsplit(uri)
    user = parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = parts.password or os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _check_client(uri: str) -> Iterator[Check]:
    """Let MLflow's own client open a store of another kind: a database server."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    shown = redact_text(uri)
    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        yield Check("mlflow", "store", "broken", f"{shown}: {redact_text(first_line(error))}", _FREE)
        return
    yield Check("mlflow", "store", "works", f"{shown} answers")


def _model_paths(config: Config) -> dict[str, str | None]:
    return {f"paths.models.{name}": path for name, path in config.paths.models.model_dump().items()}


def _is_cached(path: str) -> bool:
    repository = path.partition(":")[0]
    try:
        return any(entry.repo_id == repository for entry in scan_cache_dir().repos)
    except CacheNotFound:
        return False


def _ask_hub() -> str | None:
    """What is wrong with the way to the hub; None where it answers."""
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        return None
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return f"{constants.ENDPOINT} cannot be reached: {reason}"
