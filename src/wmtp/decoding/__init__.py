"""Generation from causal language models, token by token or by self-speculation."""

from wmtp.decoding.comparison import GreedyComparison, compare_greedy
from wmtp.decoding.counts import GenerationCounts, frequent_tokens
from wmtp.decoding.generation import Generation, Speculation, generate
from wmtp.decoding.protocols import DecoderProtocol, DraftingModel
from wmtp.decoding.sampling import SamplingSettings, choose_tokens, position_uniforms, shape_logits
from wmtp.decoding.tree import DraftTree

__all__ = [
    "DecoderProtocol",
    "DraftTree",
    "DraftingModel",
    "Generation",
    "GenerationCounts",
    "GreedyComparison",
    "SamplingSettings",
    "Speculation",
    "choose_tokens",
    "compare_greedy",
    "frequent_tokens",
    "generate",
    "position_uniforms",
    "shape_logits",
]
