"""Runs that are killed and restarted, and the comparison with one that was left alone."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from s3_server import S3Server
from tiny_llama import write_llama
from wmtp.components.loader.step_stores import open_run_store
from wmtp.distributed.checkpoint import find_latest_valid
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.pipelines.environment import run_paths
from wmtp.settings import Config
from wmtp.storage import create_s3_manager
from wmtp.tracking import read_metrics, tracking_address
from wmtp.tracking.mlflow_history import MACHINE_METRICS

UNDISTURBED: dict[str, Any] = {"kind": "none"}


class Zygote:
    """A process that forks training processes in milliseconds, see `zygote.py`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_jobs = 0
        self._errors = (folder / "zygote.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=folder,
        )

    def run(self, run: Run, plan: Mapping[str, Any], *, resume: str | None) -> Ending:
        """Train in a process of its own until its end, whichever that is."""
        self._num_jobs += 1
        log = self._folder / f"{self._num_jobs:03}-{run.name}.log"
        job = {
            "config": run.config,
            "recipe": run.recipe,
            "resume": resume,
            "run_name": run.name if resume is None else None,
            "plan": dict(plan),
            "board": str(self._folder / "board"),
            "log": str(log),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, (self._folder / "zygote.log").read_text()
        values: dict[str, Any] = json.loads(answer)
        return Ending(values.pop("status"), values.pop("seconds"), values, log)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._errors.close()


@contextmanager
def zygote(folder: Path) -> Iterator[Zygote]:
    """A zygote for the block."""
    process = Zygote(folder)
    try:
        yield process
    finally:
        process.close()


@dataclass(frozen=True, slots=True)
class Run:
    """A run by its settings, as dicts that a job can carry."""

    name: str
    config: dict[str, Any]
    recipe: dict[str, Any]

    def named(self, name: str) -> Run:
        """The same under another name."""
        return Run(name, self.config, self.recipe)

    def changed(self, **sections: Mapping[str, Any]) -> Run:
        """The same with some recipe keys changed, section by section, `data` and `model` one level deeper."""
        return Run(self.name, self.config, merged(self.recipe, sections))

    @property
    def settings(self) -> Config:
        """Its config."""
        return Config.model_validate(self.config)

    @property
    def interval(self) -> int:
        """Steps between two saves."""
        return int(self.recipe["train"]["save_every_steps"])

    @property
    def uri(self) -> str:
        """Where its steps are."""
        return f"{self.config['paths']['output']}/models/{self.name}"

    @property
    def local(self) -> Path:
        """Where its report and export are on this machine."""
        return run_paths(self.settings, self.name).output


@dataclass(frozen=True, slots=True)
class Ending:
    """How a training process ended: exit code, or minus the signal; its seconds; what it had marked."""

    status: int
    seconds: float
    board: dict[str, int]
    log: Path

    @property
    def is_inside(self) -> bool:
        """Whether it died within a save, or within an upload of what stands beside the checkpoints."""
        return self.status == -9 and bool(self.board["in_save"] or self.board["in_upload"])


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of nested dicts with changes."""
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        is_section = isinstance(value, Mapping) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if is_section else copy.deepcopy(value)
    return result


def write_tiny_model(folder: Path) -> Path:
    """A Llama of two layers, 32 wide, with the tokenizer of the built-in models."""
    torch.manual_seed(7)
    return write_llama(
        folder,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.1,
    )


def write_stream(path: Path, num_rows: int = 60) -> Path:
    """Rows of a few words each, as JSON lines."""
    draw = random.Random(5)
    words = ["add", "one", "to", "each", "of", "these", "and", "sort", "them", "all"]
    rows = [{"text": " ".join(draw.choices(words, k=draw.randint(5, 40)))} for _ in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_recipe(**sections: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose steps take milliseconds and that saves every fourth of 24."""
    recipe: dict[str, Any] = {
        "train": {
            "algo": "baseline-mtp",
            "max_steps": 24,
            "log_every_steps": 1,
            "save_every_steps": 4,
            "seed": 3,
        },
        "model": {"mtp": {"horizon": 3}},
        "data": {
            "train": {"sources": ["microcode"], "batch_size": 2, "max_length": 96},
            "eval": {"batch_size": 4, "max_examples": 4},
            "microcode": {"num_examples": 40},
        },
        "critic": {
            "recalibrate_every_steps": 3,
            "value_loss_coef": 0.5,
            "reward": {"num_programs": 12},
            "pretrain": {"max_steps": 3, "batch_size": 4, "num_rollouts": 2},
        },
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "eval": {"datasets": [], "types": ["perplexity"], "num_workers": 1},
    }
    return merged(recipe, sections)


def local_config(output: Path, model: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A config of one thread on the CPU with its output in a folder."""
    config: dict[str, Any] = {
        "paths": {"models": {"base": str(model), "ref": str(model)}, "output": str(output)},
        "devices": {"accelerator": "cpu", "precision": "fp32", "num_threads": 1},
    }
    return merged(config, sections)


def s3_config(server: S3Server, prefix: str, work: Path, model: Path, **sections: Any) -> dict[str, Any]:
    """A config with its output under a prefix of the server's bucket."""
    s3 = {
        "endpoint_url": server.endpoint_url,
        "bucket": server.bucket,
        "access_key_id": server.access_key,
        "secret_access_key": server.secret_key,
    }
    config = local_config(work, model, s3=s3)
    config["paths"] |= {"output": f"s3://{server.bucket}/{prefix}", "work": str(work)}
    return merged(config, sections)


# ------------------------------------------------------------------------------------------------ comparison


def logged_numbers(run: Run) -> dict[tuple[int, str], str]:
    """(step, name) -> hex float of all in metrics.jsonl that does not measure the machine, each once."""
    numbers: dict[tuple[int, str], str] = {}
    for row in read_metrics(run.local / "reports" / run.name / "metrics.jsonl"):
        for name, value in row.items():
            if name in ("step", "time") or name in MACHINE_METRICS:
                continue
            key = (int(row["step"]), name)
            assert key not in numbers, f"{key} was logged twice"
            numbers[key] = float(value).hex()
    return numbers


def tracked_numbers(run: Run, run_id: str) -> dict[tuple[int, str], str]:
    """The same from MLflow's history of a run."""
    numbers: dict[tuple[int, str], str] = {}
    with _client(run, run_id) as client:
        for name in client.get_run(run_id).data.metrics:
            for metric in client.get_metric_history(run_id, name):
                assert (metric.step, name) not in numbers, f"{name} of step {metric.step} is tracked twice"
                numbers[metric.step, name] = float(metric.value).hex()
    return {key: value for key, value in numbers.items() if key[1] not in MACHINE_METRICS}


@contextmanager
def _client(run: Run, run_id: str) -> Iterator[Any]:
    from wmtp.tracking.lookup import _run_client

    config = run.settings
    with _run_client(
        tracking_address(config), run_id, lambda: create_s3_manager(config), AssertionError(run_id)
    ) as client:
        yield client


def newest(run: Run) -> Checkpoint | None:
    """Its newest valid checkpoint."""
    return find_latest_valid(open_run_store(run.settings, run.uri))[0]


@dataclass(slots=True)
class Outcome:
    """What a finished run left that another one of the same settings must leave too."""

    logged: dict[tuple[int, str], str]
    tracked: dict[tuple[int, str], str]
    tensors: dict[str, str]
    export: dict[str, bytes]
    state: dict[str, Any]

    @classmethod
    def of(cls, run: Run) -> Outcome:
        """Read it."""
        checkpoint = newest(run)
        assert checkpoint is not None
        assert checkpoint.info.step == run.recipe["train"]["max_steps"]
        files = {name: entry["sha256"] for name, entry in checkpoint.files.items() if "safetensors" in name}
        final = run.local / "models" / run.name / "final"
        export = {file.name: file.read_bytes() for file in final.glob("*.safetensors")}
        assert "model.safetensors" in export
        state = copy.deepcopy(checkpoint.state)
        return cls(
            logged_numbers(run),
            tracked_numbers(run, state["mlflow_run_id"]),
            files,
            export,
            _without_times(state),
        )

    def assert_equal(self, other: Outcome) -> None:
        """Compare bit for bit."""
        assert self.logged == other.logged
        assert self.tracked == other.tracked
        assert self.tensors == other.tensors
        assert self.export == other.export
        assert self.state == other.state


def _without_times(state: dict[str, Any]) -> dict[str, Any]:
    for name in ("mlflow_run_id", "export"):
        state.pop(name)
    for name in ("elapsed_s", "waited_s"):
        state["callbacks"]["MetricsCallback"].pop(name)
    return state


# ------------------------------------------------------------------------------------------------ killing


@dataclass(slots=True)
class Tally:
    """Kills of a test: how many, how many inside a save or an upload, restarts without a checkpoint."""

    num_kills: int = 0
    num_inside: int = 0
    num_fresh: int = 0
    seconds: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)

    def count(self, plan: Mapping[str, Any], ending: Ending) -> None:
        """Add a process that was killed."""
        self.num_kills += 1
        self.num_inside += ending.is_inside
        self.kinds[plan["kind"]] = self.kinds.get(plan["kind"], 0) + 1


def restart_point(run: Run) -> str | None:
    """What a user's restart loop gives to `--resume`: the run once it has a checkpoint, nothing before."""
    return run.uri if newest(run) is not None else None


def kill_and_restart(
    process: Zygote, run: Run, whole: Ending, *, seed: int, num_kills: int, tally: Tally
) -> None:
    """Train to the end with kills on the way; every restart is checked against what the killed one said."""
    draw = random.Random(seed)
    last: Ending | None = None
    last_start = 0
    while True:
        resume = restart_point(run)
        is_over = tally.num_kills >= num_kills
        start = 0 if resume is None else committed_step(run)
        plan = UNDISTURBED if is_over else draw_plan(draw, run, start, whole)
        tally.num_fresh += resume is None and last is not None
        ending = process.run(run, plan, resume=resume)
        said = f"seed {seed}, plan {plan}, log {ending.log}:\n{ending.log.read_text()[-3000:]}"
        assert ending.status in (0, -9), said
        if last is not None:
            _check_restart(run, last, last_start, start, said)
        if ending.status == 0:
            return
        tally.count(plan, ending)
        last, last_start = ending, start


def committed_step(run: Run) -> int:
    """The step of the newest valid checkpoint."""
    checkpoint = newest(run)
    assert checkpoint is not None
    return checkpoint.info.step


def draw_plan(draw: random.Random, run: Run, start: int, whole: Ending) -> dict[str, Any]:
    """When a process is to die: at a call of a save, some time into a save, or at any time at all."""
    num_saves = (int(run.recipe["train"]["max_steps"]) - start) // run.interval
    kind = draw.choices(("call", "save", "time"), (4, 3, 3))[0] if num_saves else "time"
    if kind == "time":
        return {"kind": "time", "delay": draw.uniform(0.0, 0.9 * whole.seconds)}
    plan = {"kind": kind, "save": draw.randint(1, min(2, num_saves))}
    if kind == "save":
        return {**plan, "delay": draw.uniform(0.0, 0.8e-6 * whole.board["save_us"])}
    return {**plan, "call": draw.randint(1, whole.board["most_calls"]), "share": draw.random()}


def _check_restart(run: Run, killed: Ending, before: int, start: int, said: str) -> None:
    """What was committed is there, and no more than one interval of steps is done again.

    Args:
        run: its settings.
        killed: the process before.
        before: the step that one had begun with.
        start: the step the present one has begun with.
        said: for the message.
    """
    board = killed.board
    said = f"{start} after {before} and {board}\n{said}"
    # The commit is one rename or one request: a kill right after it may come before the mark.
    assert start in {board["committed_step"], board["saving_step"], before}, said
    assert start >= max(before, board["committed_step"]), said
    is_beside = board["in_save"] and run.recipe["train"].get("async_checkpoints")
    # A save that trained steps were not waiting for is cut off: the one before it counts.
    assert start >= board["saving_step" if is_beside else "finished_step"] - run.interval, said
