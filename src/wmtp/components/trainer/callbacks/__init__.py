"""Everything a training run does besides training: each a callback of its own."""

from wmtp.components.trainer.callbacks.base import Callback
from wmtp.components.trainer.callbacks.calibration import CriticCallback
from wmtp.components.trainer.callbacks.checkpointing import CheckpointCallback
from wmtp.components.trainer.callbacks.finite import FiniteCallback
from wmtp.components.trainer.callbacks.metrics import MetricsCallback
from wmtp.components.trainer.callbacks.phases import PhaseCallback
from wmtp.components.trainer.callbacks.progress import ProgressCallback
from wmtp.components.trainer.callbacks.requests import SAVE_FILE_NAME, RequestCallback
from wmtp.components.trainer.callbacks.signals import RunStopped, StopSignals
from wmtp.components.trainer.callbacks.validation import ValidationCallback

__all__ = [
    "SAVE_FILE_NAME",
    "Callback",
    "CheckpointCallback",
    "CriticCallback",
    "FiniteCallback",
    "MetricsCallback",
    "PhaseCallback",
    "ProgressCallback",
    "RequestCallback",
    "RunStopped",
    "StopSignals",
    "ValidationCallback",
]
