"""What is trained before the model: the critic's value head."""

from wmtp.components.pretrainer.critic_head import CriticHeadPretrainer, PretrainedCritic, PretrainerContext
from wmtp.components.pretrainer.programs import (
    collect_programs,
    read_programs,
    sample_rollouts,
    write_programs,
)
from wmtp.components.pretrainer.quality import CriticQuality, RewardedPrograms, measure_critic
from wmtp.components.pretrainer.rewards import LabelledProgram, ProgramScorer, label_by_median

__all__ = [
    "CriticHeadPretrainer",
    "CriticQuality",
    "LabelledProgram",
    "PretrainedCritic",
    "PretrainerContext",
    "ProgramScorer",
    "RewardedPrograms",
    "collect_programs",
    "label_by_median",
    "measure_critic",
    "read_programs",
    "sample_rollouts",
    "write_programs",
]
