"""Scorers: how much does each token matter?"""

from wmtp.components.scorer.base import Scorer, ScorerContext, ScorerSetup, TokenScores
from wmtp.components.scorer.critic import CriticScorer
from wmtp.components.scorer.rho1 import Rho1ExcessScorer
from wmtp.components.scorer.simple import ColumnScorer, DftScorer, HeadDecayScorer

__all__ = [
    "ColumnScorer",
    "CriticScorer",
    "DftScorer",
    "HeadDecayScorer",
    "Rho1ExcessScorer",
    "Scorer",
    "ScorerContext",
    "ScorerSetup",
    "TokenScores",
]
