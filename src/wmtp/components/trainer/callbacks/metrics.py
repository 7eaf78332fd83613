"""Training metrics, as means over the steps since the last log line."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wmtp.components.trainer.callbacks.base import Callback
from wmtp.tracking import Tracker

if TYPE_CHECKING:
    from wmtp.components.trainer.base import TrainingRun
    from wmtp.components.trainer.step import StepResult


@dataclass(frozen=True, slots=True)
class _Step:
    """What is kept of a step until the next log line; tensors stay on the device."""

    loss: Tensor
    grad_norm: Tensor
    is_nonfinite: Tensor
    ce_sum_H: Tensor
    num_targets_H: Tensor
    num_tokens: Tensor
    num_padded_tokens: int
    metrics: dict[str, Tensor]


class MetricsCallback(Callback):
    """Logs the `train/*` metrics every `every_steps` updates; between these nothing is read from the device.

    Means are over the steps whose update was applied, if there is one; the others are counted in
    `train/nonfinite_steps`. A run that is stopped between two lines keeps what it has for the run that goes
    on from its checkpoint, so that this one logs what an uninterrupted run logs.

    Args:
        tracker: where the metrics go.
        every_steps: log interval in updates.
        flops_per_token: model FLOPs of forward and backward per token, for `train/mfu`.
        peak_flops: FLOP/s of this machine's dense matrix product in the run's precision.
    """

    def __init__(
        self, tracker: Tracker, every_steps: int, *, flops_per_token: float, peak_flops: float
    ) -> None:
        self.tracker = tracker
        self.every_steps = every_steps
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.latest: dict[str, float] = {}
        self.latest_step = -1
        self._steps: list[_Step] = []
        self._num_counted = 0  # of these, steps whose tokens `run.num_tokens` has already
        self._began = time.perf_counter()
        self._waited = 0.0  # of `run.data_wait_s`, what belongs to earlier log lines
        self._saved: dict[str, Any] = {"steps": [], "num_counted": 0, "elapsed_s": 0.0, "waited_s": 0.0}
        self._run: TrainingRun | None = None

    def on_train_start(self, run: TrainingRun) -> None:
        """Start the clock, where a resumed run's stood."""
        self._run = run
        saved = self._saved
        self._steps = [_from_state(step, run.context.device) for step in saved["steps"]]
        self._num_counted = int(saved["num_counted"])
        self._began = time.perf_counter() - float(saved["elapsed_s"])
        self._waited = run.data_wait_s - float(saved["waited_s"])

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        """Add up; log when it is time."""
        assert run.grad_norm is not None
        assert run.is_nonfinite is not None
        step = _Step(
            result.loss,
            run.grad_norm,
            run.is_nonfinite,
            result.ce_sum_H,
            result.num_targets_H,
            result.num_tokens,
            result.num_padded_tokens,
            dict(result.metrics),
        )
        self._steps.append(step)
        is_full = run.step % self.every_steps == 0
        if is_full or run.step == run.max_steps:
            self._log(run)
        if is_full:
            self._steps, self._num_counted = [], 0
            self._began, self._waited = time.perf_counter(), run.data_wait_s

    def state_dict(self) -> dict[str, Any]:
        """The steps since the last log line; numbers as hexadecimal text, which is exact and knows NaN."""
        assert self._run is not None
        return {
            "steps": [_to_state(step) for step in self._steps],
            "num_counted": self._num_counted,
            "elapsed_s": time.perf_counter() - self._began,
            "waited_s": self._run.data_wait_s - self._waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._saved = state

    def _log(self, run: TrainingRun) -> None:
        everything = self._steps
        tokens = torch.stack([step.num_tokens for step in everything]).tolist()
        run.num_tokens += sum(tokens[self._num_counted :])
        self._num_counted = len(everything)
        is_bad = [flag != 0.0 for flag in torch.stack([step.is_nonfinite for step in everything]).tolist()]
        steps = [step for step, bad in zip(everything, is_bad, strict=True) if not bad] or everything
        elapsed = time.perf_counter() - self._began
        ce_sum_H = torch.stack([step.ce_sum_H for step in steps]).sum(0)
        num_targets_H = torch.stack([step.num_targets_H for step in steps]).sum(0)
        ce_H = (ce_sum_H / num_targets_H.clamp(min=1)).tolist()
        metrics = {
            "train/loss": _mean([step.loss for step in steps]),
            "train/ce_mean": float(ce_sum_H.sum() / num_targets_H.sum().clamp(min=1)),
            **{f"train/ce_head_{head}": ce for head, ce in enumerate(ce_H)},
            **{name: _mean([step.metrics[name] for step in steps]) for name in steps[0].metrics},
            "train/valid_token_ratio": float(num_targets_H[0])
            / sum(step.num_padded_tokens for step in steps),
            "train/lr": run.context.optimizer.scheduler.get_last_lr()[0],
            "train/grad_norm": _mean([step.grad_norm for step in steps]),
            "train/tokens_per_second": sum(tokens) / elapsed,
            "train/mfu": sum(tokens) * self.flops_per_token / elapsed / self.peak_flops,
            "train/memory_peak_gib": peak_memory_gib(run.context.device),
            "train/data_wait_ratio": (run.data_wait_s - self._waited) / elapsed,
            "train/seconds_per_step": elapsed / len(everything),
        }
        if any(is_bad):
            metrics["train/nonfinite_steps"] = float(sum(is_bad))
        self.latest, self.latest_step = metrics, run.step
        self.tracker.log_metrics(metrics, run.step)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # getrusage counts kibibytes on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a dense matrix product on this machine: the ceiling that `train/mfu` is a share of."""
    size = 4096 if device.type == "cuda" else 512
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        _ = left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack([value.float() for value in values]).mean())


def _to_state(step: _Step) -> dict[str, Any]:
    return {
        "loss": float(step.loss).hex(),
        "grad_norm": float(step.grad_norm).hex(),
        "is_nonfinite": float(step.is_nonfinite),
        "ce_sum_H": [value.hex() for value in step.ce_sum_H.tolist()],
        "num_targets_H": step.num_targets_H.tolist(),
        "num_tokens": int(step.num_tokens),
        "num_padded_tokens": step.num_padded_tokens,
        "metrics": {name: float(value).hex() for name, value in step.metrics.items()},
    }


def _from_state(state: dict[str, Any], device: torch.device) -> _Step:
    def scalar(text: str) -> Tensor:
        return torch.tensor(float.fromhex(text), dtype=torch.float64, device=device)

    return _Step(
        loss=scalar(state["loss"]),
        grad_norm=scalar(state["grad_norm"]),
        is_nonfinite=torch.tensor(float(state["is_nonfinite"]), device=device),
        ce_sum_H=torch.tensor([float.fromhex(text) for text in state["ce_sum_H"]], device=device),
        num_targets_H=torch.tensor(state["num_targets_H"], device=device),
        num_tokens=torch.tensor(int(state["num_tokens"]), device=device),
        num_padded_tokens=int(state["num_padded_tokens"]),
        metrics={name: scalar(text) for name, text in state["metrics"].items()},
    )
