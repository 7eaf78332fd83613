"""Where a run happens: device, precision, threads, seeds and folders."""

from __future__ import annotations

import os
import random
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from platform import machine

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from wmtp.exceptions import UserInputError
from wmtp.settings import Config, Recipe
from wmtp.storage import PathResolver

_RUN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


@dataclass(frozen=True, slots=True)
class Environment:
    """What the `devices` section came to on this machine."""

    device: torch.device
    precision: torch.dtype


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Folders of one run under `paths.output`; where that is on S3, under `paths.work/<bucket>/<prefix>`.

    Attributes:
        name: the run's name.
        output: the folder of this machine that has them, absolute.
        checkpoints: `models/<run>`, which holds `step-N` folders and, at the end, the export `final`.
        report: `reports/<run>`: metrics.jsonl, evaluation, report.
        remote: `paths.output` where that is on S3: the steps are there, and everything else goes there too.
    """

    name: str
    output: Path
    checkpoints: Path
    report: Path
    remote: str | None = None

    @property
    def run_uri(self) -> str:
        """Where the `step-N` folders are, for `--resume`."""
        return str(self.checkpoints) if self.remote is None else f"{self.remote}/models/{self.name}"

    @property
    def export(self) -> Path:
        """The trained model as a Hugging Face checkpoint."""
        return self.checkpoints / "final"

    @property
    def metrics_file(self) -> Path:
        """Every logged number, one JSON object a line."""
        return self.report / "metrics.jsonl"


def prepare_environment(config: Config, recipe: Recipe) -> Environment:
    """Choose device and precision, set threads and seed every global random generator."""
    devices = config.devices
    if devices.num_threads is not None:
        torch.set_num_threads(devices.num_threads)
    device = _select_device(devices.accelerator)
    precision = _select_precision(devices.precision, device)
    # Loading has a progress bar of its own on the terminal that this project draws on.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    seed_everything(recipe.train.seed)
    return Environment(device, precision)


def describe_device(device: torch.device) -> str:
    """The accelerator by its name, or the kind of processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {machine()}"


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def run_paths(config: Config, run_name: str) -> RunPaths:
    """Folders of a run.

    Raises:
        UserInputError: the name cannot be a folder name, or the output can be written to by no means known
            here.
    """
    if not _RUN_NAME.match(run_name):
        raise UserInputError(
            f"run name {run_name!r} cannot be a folder name",
            remedy="give a --run-name of letters, digits, '.', '_' and '-', a letter or digit first",
        )
    kind, resolved = PathResolver().resolve(config.paths.output)
    if kind not in ("local", "hub", "s3"):
        raise UserInputError(
            f"paths.output {config.paths.output!r} is neither a local folder nor on S3",
            remedy="give a local folder or s3://bucket/prefix",
        )
    remote = resolved.rstrip("/") if kind == "s3" else None
    # `runs/mine` has the form of a hub id, but nothing can be written to the hub.
    folder = config.paths.output if remote is None else config.paths.work
    output = Path(os.path.abspath(os.path.expanduser(folder.removeprefix("file://"))))
    if remote is not None:
        # Two outputs on S3 must not meet in one folder.
        output /= remote.removeprefix("s3://")
    return RunPaths(run_name, output, output / "models" / run_name, output / "reports" / run_name, remote)


def default_run_name(recipe: Recipe) -> str:
    """`<algo>-<sources>-<time>`, in local time to the second."""
    sources = "+".join(Path(source).name for source in recipe.data.train.sources)
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{recipe.train.algo}-{sources}-{stamp}")


def _select_device(accelerator: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        return torch.device(next(name for name, is_there in available.items() if is_there))
    if not available[accelerator]:
        usable = ", ".join(name for name, is_there in available.items() if is_there)
        raise UserInputError(
            f"devices.accelerator is {accelerator!r}, which this machine does not have",
            remedy=f"available: {usable}; or auto",
        )
    return torch.device(accelerator)


def _select_precision(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32
