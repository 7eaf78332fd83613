"""Tokenizers: examples to features."""

from __future__ import annotations

from wmtp.components.tokenizer.hf import HfTokenizer, TokenizerContext, TokenizerSettings

__all__ = ["HfTokenizer", "TokenizerContext", "TokenizerSettings"]
