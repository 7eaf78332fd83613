"""Raw tokenizer files as a component."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from wmtp.components.registry import tokenizer_registry
from wmtp.components.tokenizer.hf import HfTokenizer, TokenizerSettings, require_path
from wmtp.components.tokenizer.raw_files import find_raw_file, load_raw_tokenizer


@tokenizer_registry.register("raw", version="1.0.0", description="a SentencePiece or tekken file")
class RawTokenizer(HfTokenizer):
    """As `HfTokenizer`, read from the raw file (`tokenizer.model`, `tekken.json`) whatever else is there.

    Ids are those that `sentencepiece` or `mistral-common` give for the same text. Special tokens spelled out
    in the data stay text.
    """

    @staticmethod
    def load(settings: TokenizerSettings) -> PreTrainedTokenizerBase:
        """Read the file at `settings.path`, which is a file, a folder, or a hub id."""
        return load_raw_tokenizer(find_raw_file(require_path(settings)))
