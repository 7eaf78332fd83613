"""What is trained before the model: the critic's value head."""

from wmtp.components.pretrainer.critic_head import CriticHeadPretrainer, PretrainedCritic, PretrainerContext
from wmtp.components.pretrainer.programs import (
    LabelledProgram,
    collect_programs,
    read_programs,
    sample_rollouts,
    write_programs,
)
from wmtp.components.pretrainer.quality import CriticQuality, RewardedPrograms, measure_critic

__all__ = [
    "CriticHeadPretrainer",
    "CriticQuality",
    "LabelledProgram",
    "PretrainedCritic",
    "PretrainerContext",
    "RewardedPrograms",
    "collect_programs",
    "measure_critic",
    "read_programs",
    "sample_rollouts",
    "write_programs",
]
