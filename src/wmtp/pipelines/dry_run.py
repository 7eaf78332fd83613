"""What a dry run measures: one whole step at the longest length the data has."""

from __future__ import annotations

import time
from typing import Any

from wmtp.components.data import to_device
from wmtp.components.trainer import BaseWmtpTrainer, TrainerContext
from wmtp.components.trainer.base import set_training
from wmtp.components.trainer.callbacks.metrics import peak_memory_gib


def measure_longest_batch(trainer: BaseWmtpTrainer, context: TrainerContext) -> dict[str, Any]:
    """Run scoring, forward, backward and update on the micro-batch with the most tokens.

    Returns:
        Facts for a person to read: shapes, tokens, parameters, loss, time and peak memory.
    """
    run = trainer.training_run
    set_training(context.modules)
    batch = to_device(context.data.longest_batch(), context.device)
    began = time.perf_counter()
    result = trainer.run_step([batch] * run.micro_batches_per_step)
    loss = float(result.loss)
    model = context.model
    return {
        "micro-batch (rows, tokens, heads)": tuple(batch["labels"].shape),
        "micro-batches a step": run.micro_batches_per_step,
        "micro-batches an epoch": context.data.batches_per_epoch() or "not known before it has been read",
        "trained parameters": sum(
            parameter.numel()
            for module in context.modules.values()
            for parameter in module.parameters()
            if parameter.requires_grad
        ),
        "hidden size, vocabulary": (model.unembedding_VD.shape[1], model.unembedding_VD.shape[0]),
        "device, precision": f"{context.device}, {str(context.precision).removeprefix('torch.')}",
        "loss of the first step": round(loss, 4),
        "seconds of the step": round(time.perf_counter() - began, 3),
        "peak memory (GiB)": round(peak_memory_gib(context.device), 3),
    }
