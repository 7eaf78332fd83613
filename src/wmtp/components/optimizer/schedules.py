"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from typing import Literal

ScheduleName = Literal["cosine", "wsd", "linear", "constant"]


def learning_rate_factor(
    step: int,
    *,
    schedule: ScheduleName,
    max_steps: int,
    warmup_steps: int = 0,
    decay_ratio: float = 0.2,
    min_lr_ratio: float = 0.1,
) -> float:
    """Factor on the peak learning rate for the update made at `step` (0-based).

    The first `warmup_steps` updates rise linearly; the last one of them reaches 1. Then `cosine` and `linear`
    fall to `min_lr_ratio` at the last step, `wsd` (warm-up, stable, decay) stays at 1 and falls linearly over
    the last
    `decay_ratio` of the steps, `constant` stays at 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    decay_start = warmup_steps
    if schedule == "wsd":
        decay_start = max(warmup_steps, max_steps - math.ceil(decay_ratio * max_steps))
    num_decay_steps = max(max_steps - 1 - decay_start, 1)
    progress = min(max(step - decay_start, 0) / num_decay_steps, 1.0)
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return min_lr_ratio + (1.0 - min_lr_ratio) * shape
