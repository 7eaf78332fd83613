"""Trainers: one loop, four ways to weigh tokens."""

from wmtp.components.trainer.base import BaseWmtpTrainer, TrainerContext, TrainingRun, TrainResult
from wmtp.components.trainer.baseline import BaselineMtpTrainer
from wmtp.components.trainer.critic import CriticWmtpTrainer
from wmtp.components.trainer.rho1 import Rho1WmtpTrainer
from wmtp.components.trainer.weighted_ce import MtpWeightedCeTrainer

__all__ = [
    "BaseWmtpTrainer",
    "BaselineMtpTrainer",
    "CriticWmtpTrainer",
    "MtpWeightedCeTrainer",
    "Rho1WmtpTrainer",
    "TrainResult",
    "TrainerContext",
    "TrainingRun",
]
