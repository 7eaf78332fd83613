"""Generation from causal language models."""

from wmtp.decoding.generation import DecoderProtocol, Generation, generate
from wmtp.decoding.sampling import SamplingSettings, choose_tokens, position_uniforms, shape_logits

__all__ = [
    "DecoderProtocol",
    "Generation",
    "SamplingSettings",
    "choose_tokens",
    "generate",
    "position_uniforms",
    "shape_logits",
]
