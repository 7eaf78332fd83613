"""Training metrics, as means over the steps since the last log line."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wmtp.components.trainer.callbacks.base import Callback
from wmtp.tracking import Tracker

if TYPE_CHECKING:
    from wmtp.components.trainer.base import TrainingRun
    from wmtp.components.trainer.step import StepResult


class MetricsCallback(Callback):
    """Logs the `train/*` metrics every `every_steps` updates; between these nothing is read from the device.

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
        self._clear()

    def on_train_start(self, run: TrainingRun) -> None:
        """Start the clock."""
        self._clear()

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        """Add up; log when it is time."""
        self._results.append(result)
        assert run.grad_norm is not None
        self._grad_norms.append(run.grad_norm)
        if run.step % self.every_steps == 0 or run.step == run.max_steps:
            self._log(run)

    def on_train_end(self, run: TrainingRun) -> None:
        """Log what a stopped run has left."""
        if self._results:
            self._log(run)

    def _clear(self) -> None:
        self._results: list[StepResult] = []
        self._grad_norms: list[Tensor] = []
        self._began = time.perf_counter()
        self._waited = 0.0

    def _log(self, run: TrainingRun) -> None:
        results, num_steps = self._results, len(self._results)
        num_tokens = int(torch.stack([result.num_tokens for result in results]).sum())
        run.num_tokens += num_tokens
        elapsed = time.perf_counter() - self._began
        ce_sum_H = torch.stack([result.ce_sum_H for result in results]).sum(0)
        num_targets_H = torch.stack([result.num_targets_H for result in results]).sum(0)
        ce_H = (ce_sum_H / num_targets_H.clamp(min=1)).tolist()
        metrics = {
            "train/loss": _mean([result.loss for result in results]),
            "train/ce_mean": float(ce_sum_H.sum() / num_targets_H.sum().clamp(min=1)),
            **{f"train/ce_head_{head}": ce for head, ce in enumerate(ce_H)},
            **{name: _mean([result.metrics[name] for result in results]) for name in results[0].metrics},
            "train/valid_token_ratio": float(num_targets_H[0])
            / sum(result.num_padded_tokens for result in results),
            "train/lr": run.context.optimizer.scheduler.get_last_lr()[0],
            "train/grad_norm": _mean(self._grad_norms),
            "train/tokens_per_second": num_tokens / elapsed,
            "train/mfu": num_tokens * self.flops_per_token / elapsed / self.peak_flops,
            "train/memory_peak_gib": peak_memory_gib(run.context.device),
            "train/data_wait_ratio": (run.data_wait_s - self._waited) / elapsed,
            "train/seconds_per_step": elapsed / num_steps,
        }
        self.latest, self.latest_step = metrics, run.step
        self.tracker.log_metrics(metrics, run.step)
        self._clear()
        self._waited = run.data_wait_s


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
