"""MicroCode's own tokenizer: a small byte-level BPE trained from generated text."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from wmtp.evaluation.microcode.generator import generate_problems
from wmtp.exceptions import UserInputError

BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = "<|bos|>", "<|eos|>", "<|pad|>"
_SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)
_NUM_BYTES = 256
_NUM_TRAINING_PROBLEMS = 1500
_MAX_LENGTH = 512
# A line's indentation stays whole, digits stand alone, and a word takes the blank before it along.
_PIECES = r"\n[ ]*|\d| ?[A-Za-z_]+| ?[^\sA-Za-z_\d]+|[ ]+"


def build_tokenizer(vocab_size: int = 512, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the tokenizer from generated problems; the same arguments always give the same tokenizer.

    Every byte is in the vocabulary, so any text round-trips exactly. Numbers are cut into digits. Encoding
    adds no special tokens: whoever builds training examples places beginning and end.

    Args:
        vocab_size: tokens in all, special ones included; fewer when the text has no more merges.
        seed: of the problems it is trained from.

    Raises:
        UserInputError: the vocabulary has no room for all bytes and the special tokens.
    """
    num_special = len(_SPECIAL_TOKENS)
    if vocab_size < _NUM_BYTES + num_special:
        raise UserInputError(
            f"a byte-level vocabulary of {vocab_size} has no room for {_NUM_BYTES} bytes and"
            f" {num_special} special tokens",
            remedy=f"Use at least {_NUM_BYTES + num_special}.",
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=Tokenizer.from_str(_train(vocab_size, seed)),
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=_MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


@lru_cache(maxsize=8)
def _train(vocab_size: int, seed: int) -> str:
    """The trained tokenizer as JSON, kept: a run asks for it with the model and with the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    problems = generate_problems(
        split="train", num_problems=_NUM_TRAINING_PROBLEMS, seed=seed, wrong_ratio=0.5, comment_ratio=0.1
    )
    tokenizer.train_from_iterator(
        (problem.program for problem in problems),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(_SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return str(tokenizer.to_str())
