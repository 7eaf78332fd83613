"""Tokenizers: examples to features, and values carried over between tokenizers."""

from __future__ import annotations

from wmtp.components.tokenizer.alignment import LocatedTokens, Span, carry_over, locate_tokens
from wmtp.components.tokenizer.hf import HfTokenizer, TokenizerContext, TokenizerSettings
from wmtp.components.tokenizer.raw import RawTokenizer

__all__ = [
    "HfTokenizer",
    "LocatedTokens",
    "RawTokenizer",
    "Span",
    "TokenizerContext",
    "TokenizerSettings",
    "carry_over",
    "locate_tokens",
]
