"""The machine a run would use: Python, torch, cores, memory, GPU, and the packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

from wmtp import __version__
from wmtp.pipelines.doctor_check import Check, first_line, size_text
from wmtp.pipelines.doctor_s3 import uses_s3
from wmtp.settings import Config

_LOW_MEMORY_BYTES = 2 * 2**30
_EXTRAS = {
    "s3": "s3:// paths",
    "qlora": "a trunk in four bits (model.lora.quantization: nf4)",
    "gpu": "transformers' own ways of placing large models",
}
# Extras that nothing of a run needs.
_NOT_SHOWN = ("dev",)


def check_machine() -> Iterator[Check]:
    """Python, cores, memory, torch."""
    place = f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield Check("machine", "python", "works", f"{platform.python_version()} on {place}; wmtp {__version__}")
    num_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _cpu_quota()
    shown = f"{num_cores} usable" + ("" if quota is None else f", of which the container may use {quota:.1f}")
    if quota is not None and quota < num_cores:
        remedy = f"set devices.num_threads to {max(1, int(quota))}: more threads than that slow each other"
        yield Check("machine", "cores", "warning", shown, remedy)
    else:
        yield Check("machine", "cores", "works", shown)
    memory = _memory()
    if memory is not None:
        total, available = memory
        detail = f"{size_text(available)} of {size_text(total)} available"
        if available < _LOW_MEMORY_BYTES:
            remedy = "end other programs; `wmtp validate` estimates what a run needs"
            yield Check("machine", "memory", "warning", detail, remedy)
        else:
            yield Check("machine", "memory", "works", detail)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    yield Check(
        "machine", "torch", "works", f"{torch.__version__} ({build}), {torch.get_num_threads()} threads"
    )


def check_gpu(config: Config) -> Iterator[Check]:
    """GPUs: what is there, how much memory is free, bf16, and whether computing on them works."""
    accelerator = config.devices.accelerator
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _check_cuda_device(index)
        return
    if torch.backends.mps.is_available():
        yield Check("gpu", "mps", "works", "Apple's GPU")
        return
    has_driver = Path("/proc/driver/nvidia/version").exists()
    wants_gpu = accelerator in ("cuda", "mps")
    if has_driver and not torch.version.cuda:
        detail = "an NVIDIA driver is here, and torch is a build for the CPU alone"
        remedy = "install a build of torch with CUDA"
    elif has_driver:
        detail = "an NVIDIA driver is here, and torch finds no GPU"
        remedy = "compare the driver (nvidia-smi) with the CUDA version of torch; check CUDA_VISIBLE_DEVICES"
    else:
        detail = "none; runs use the CPU"
        remedy = ""
    if wants_gpu:
        detail = f"{detail.partition(';')[0]}, and devices.accelerator asks for {accelerator}"
        remedy = remedy or "run where there is one, or set devices.accelerator: auto"
        yield Check("gpu", "devices", "broken", detail, remedy)
    else:
        yield Check("gpu", "devices", "warning" if remedy else "works", detail, remedy)


def check_packages(config: Config) -> Iterator[Check]:
    """The packages this one needs, and those that only some runs need."""
    requirements = [Requirement(text) for text in importlib.metadata.requires("wmtp") or []]
    base = [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    problems = [problem for each in base if (problem := _problem(each))]
    if problems:
        remedy = "install again: make setup, or pip install wmtp"
        yield Check("packages", "required", "broken", "; ".join(problems), remedy)
    else:
        yield Check("packages", "required", "works", f"all {len(base)} are there, in versions that fit")
    extras = importlib.metadata.metadata("wmtp").get_all("Provides-Extra") or []
    needed = {"s3": uses_s3(config)}
    for extra in sorted(set(extras) - set(_NOT_SHOWN)):
        chosen = [each for each in requirements if each.marker and each.marker.evaluate({"extra": extra})]
        problems = [problem for each in chosen if each not in base and (problem := _problem(each))]
        purpose = _EXTRAS.get(extra, "optional features")
        if not problems:
            yield Check("packages", extra, "works", f"there, for {purpose}")
        elif needed.get(extra, False):
            remedy = f'pip install "wmtp[{extra}]"'
            yield Check("packages", extra, "broken", f"{'; '.join(problems)}; needed for {purpose}", remedy)
        else:
            detail = f'{"; ".join(problems)}; only for {purpose} (pip install "wmtp[{extra}]")'
            yield Check("packages", extra, "works", detail)


def _problem(requirement: Requirement) -> str | None:
    """What is wrong with a requirement, None where it is fulfilled."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} is {version}, and {requirement.specifier} is needed"


def _check_cuda_device(index: int) -> Check:
    subject = f"cuda:{index}"
    try:
        name = torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(64, 64, device=subject)
        is_right = bool(((ones @ ones) == 64).all().item())
        has_bf16 = torch.cuda.is_bf16_supported()
    # What a driver raises has many names; torch's own errors of CUDA are RuntimeErrors.
    except RuntimeError as error:
        remedy = "look at nvidia-smi; another program may hold it, or driver and torch do not fit"
        return Check("gpu", subject, "broken", f"computing on it fails: {first_line(error)}", remedy)
    major, minor = torch.cuda.get_device_capability(index)
    detail = f"{name}, {size_text(free)} of {size_text(total)} free, capability {major}.{minor}"
    if not is_right:
        return Check("gpu", subject, "broken", f"{detail}; it computes wrong numbers", "do not use this GPU")
    if not has_bf16:
        return Check(
            "gpu", subject, "warning", f"{detail}; no bf16", "runs use fp32 there, which needs more memory"
        )
    return Check("gpu", subject, "works", f"{detail}, bf16")


def _cpu_quota() -> float | None:
    """Cores a container may use by its quota; None where there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _memory() -> tuple[int, int] | None:
    """Total and available bytes, a container's limit included; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        entries = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total, available = entries["MemTotal"], entries["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return total, available
    return min(total, limit), max(0, min(available, limit - used))
