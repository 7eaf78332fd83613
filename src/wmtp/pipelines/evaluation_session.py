"""The folder of an evaluation: new, or that of an interrupted one which measures the same."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from wmtp.components.evaluator import model_fingerprint, tokenizer_fingerprint
from wmtp.components.tokenizer import HfTokenizer
from wmtp.evaluation.records import key_of
from wmtp.exceptions import UserInputError
from wmtp.modeling import MTPModel
from wmtp.pipelines.environment import Environment, RunPaths, default_run_name, run_paths
from wmtp.pipelines.resume import changed_keys, list_changes, refuse_existing_report
from wmtp.settings import Config, Recipe, redacted_dump
from wmtp.storage.atomic import write_json_atomic
from wmtp.tracking import flatten_params

logger = logging.getLogger(__name__)

STATE_FILE: Final = "evaluation.json"
_LOCK_FILE: Final = ".evaluation.lock"
# How fast programs are generated and run; not what comes of it.
_FREE_KEYS: Final = ("eval.batch_size", "eval.num_workers")


@dataclass(frozen=True, slots=True)
class EvaluationIdentity:
    """What an evaluation measures, and on what.

    Attributes:
        fingerprint: of model, tokenizer and precision: what every generation depends on.
        facts: everything, as flat text, so that a difference can be named.
    """

    fingerprint: str
    facts: dict[str, str]


@dataclass(slots=True)
class EvaluationSession:
    """An evaluation that this process runs.

    Attributes:
        paths: its folders.
        mlflow_run_id: of the run that is continued; None for a new one.
    """

    paths: RunPaths
    mlflow_run_id: str | None
    _identity: EvaluationIdentity

    def begin(self, checkpoint: str, mlflow_run_id: str | None) -> None:
        """Note what is evaluated, for whoever goes on after an interruption."""
        self._write(checkpoint=checkpoint, mlflow_run_id=mlflow_run_id, finished=False)

    def finish(self) -> None:
        """Note that everything was measured."""
        state = _read_state(self.paths.report)
        self._write(**{**state, "finished": True})

    def _write(self, *, checkpoint: str, mlflow_run_id: str | None, finished: bool, **_: Any) -> None:
        self.paths.report.mkdir(parents=True, exist_ok=True)
        write_json_atomic(
            self.paths.report / STATE_FILE,
            {
                "checkpoint": checkpoint,
                "mlflow_run_id": mlflow_run_id,
                "finished": finished,
                "identity": self._identity.facts,
            },
        )


def generation_fingerprint(model: MTPModel, tokenizer: HfTokenizer, environment: Environment) -> str:
    """What a generation depends on besides its prompt and the settings of sampling."""
    return key_of(
        model_fingerprint(model),
        tokenizer_fingerprint(tokenizer),
        str(environment.precision),
        environment.device.type,
    )


def describe_evaluation(
    config: Config, recipe: Recipe, environment: Environment, model: MTPModel, tokenizer: HfTokenizer
) -> EvaluationIdentity:
    """Name everything that results depend on."""
    fingerprint = generation_fingerprint(model, tokenizer, environment)
    dump = redacted_dump(recipe)
    facts = flatten_params(
        {
            "eval": dump["eval"],
            "data": {"eval": dump["data"]["eval"], "microcode": dump["data"]["microcode"]},
            "paths": {"datasets": redacted_dump(config)["paths"]["datasets"]},
        },
        max_value=10**6,
    )
    kept = {name: value for name, value in facts.items() if name not in _FREE_KEYS}
    return EvaluationIdentity(fingerprint, {"model, tokenizer and precision": fingerprint, **kept})


@contextmanager
def open_session(
    config: Config, recipe: Recipe, run_name: str | None, identity: EvaluationIdentity
) -> Iterator[EvaluationSession]:
    """Take the folder of an evaluation for this process.

    With a name: a new folder, or the one of an interrupted evaluation of the same. Without: an interrupted
    evaluation of the same that nobody is running, the latest, or else a new folder.

    Raises:
        UserInputError: the named folder holds something else, is finished, or is in use.
    """
    name = run_name or _interrupted(config, recipe, identity)
    is_new_name = name is None
    paths = run_paths(config, name or f"eval-{default_run_name(recipe)}")
    state = {} if is_new_name else _read_state(paths.report)
    if state:
        _check_same(paths, state, identity)
        logger.info("going on with the interrupted evaluation in %s", paths.report)
    else:
        refuse_existing_report(config, paths)
    paths.report.mkdir(parents=True, exist_ok=True)
    lock = _try_lock(paths.report)
    if lock is None:
        raise UserInputError(
            f"another process is running the evaluation in {paths.report}",
            remedy="wait for it, or choose another --run-name",
        )
    try:
        yield EvaluationSession(paths, state.get("mlflow_run_id"), identity)
    finally:
        # The file stays: who removes a lock that another process has just opened leaves two holders.
        lock.close()


def _interrupted(config: Config, recipe: Recipe, identity: EvaluationIdentity) -> str | None:
    """The latest unnamed evaluation that measures the same, is unfinished and not running."""
    reports = run_paths(config, "any").report.parent
    prefix = f"eval-{default_run_name(recipe)}"[: -len("YYYYmmdd-HHMMSS")]
    found = [path.parent for path in reports.glob(f"*/{STATE_FILE}") if path.parent.name.startswith(prefix)]
    for folder in sorted(found, key=lambda folder: (folder / STATE_FILE).stat().st_mtime, reverse=True):
        state = _read_state(folder)
        if state and not state["finished"] and state["identity"] == identity.facts:
            lock = _try_lock(folder)
            if lock is not None:
                lock.close()
                return folder.name
    return None


def _check_same(paths: RunPaths, state: Mapping[str, Any], identity: EvaluationIdentity) -> None:
    before, now = state["identity"], identity.facts
    changed = changed_keys(before, now)
    if state["finished"]:
        raise UserInputError(
            f"run {paths.name!r} already has results in {paths.report}",
            remedy="choose another --run-name",
        )
    if changed:
        raise UserInputError(
            f"run {paths.name!r} is an interrupted evaluation of something else:\n"
            + list_changes(before, now, changed),
            remedy="go on with what it was started with, or choose another --run-name",
        )


def _read_state(folder: Path) -> dict[str, Any]:
    """What `EvaluationSession` wrote; empty where there is nothing, or no evaluation of this kind."""
    with suppress(OSError, ValueError):
        state = json.loads((folder / STATE_FILE).read_bytes())
        if isinstance(state, dict) and isinstance(state.get("identity"), dict) and "finished" in state:
            return state
    return {}


def _try_lock(folder: Path) -> IO[bytes] | None:
    """Lock a folder for as long as the file stays open, which a killed process cannot forget to end."""
    file = open(folder / _LOCK_FILE, "ab")  # noqa: SIM115 - the caller closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
