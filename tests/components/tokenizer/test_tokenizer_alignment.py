"""Values carried over by characters, spans of documents, and how two tokenizers relate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from wmtp.components.tokenizer import HfTokenizer, TokenizerSettings
from wmtp.components.tokenizer.alignment import Span, carry_over, locate_tokens
from wmtp.components.tokenizer.pairs import compare_tokenizers, require_rows
from wmtp.exceptions import DataError, UserInputError

CODE = [
    "def add(first, second):\n    return first + second\n",
    "for index in range(10):\n\tprint(index)\n\n\n",
    "# \ud55c\uad6d\uc5b4 \U0001f600\n",
    *Path(json.__file__).read_text(encoding="utf-8").splitlines(keepends=True),
]
ROWS = [
    {"prompt": "def add(a, b):\n    ", "completion": "return a + b\n"},
    {"prompt": "# \ud55c\uad6d\uc5b4 \U0001f600", "completion": "\U0001f600\u00e9\n\tx  = 1"},
    {"prompt": "", "completion": " leading <|end|> spelled\n"},
    {"prompt": "x", "completion": "y"},
]


def byte_level(
    vocabulary: int = 330, *, bos: bool = True, extra: Sequence[str] = (), **arguments: Any
) -> HfTokenizer:
    """A byte-level tokenizer trained on `CODE`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CODE, trainer)
    core.add_special_tokens(list(extra))
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "name_or_path": f"bytes-{vocabulary}"}
    return wrap(core, **{**names, **arguments})


def llama_like(vocabulary: int = 340, *, byte_fallback: bool = True) -> HfTokenizer:
    """A tokenizer with blanks as letters, a blank before every text, and bytes for what it does not know."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    corpus = [line for line in "".join(CODE).split("\n") if line.isascii()]
    core.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", name_or_path="llama-like")


def wrap(core: Tokenizer, **arguments: Any) -> HfTokenizer:
    return HfTokenizer(
        TokenizerSettings(tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, **arguments))
    )


def targets_of(feature: Any) -> list[bool]:
    return [label != -100 for label in feature["labels"]]


# carry_over


def naive_carry_over(
    values: Sequence[float], from_spans: Sequence[Span], to_spans: Sequence[Span], length: int
) -> list[float]:
    """Character by character, for spans that cover every character exactly once on each side."""
    on_character = np.zeros(length)
    for value, (start, end) in zip(values, from_spans, strict=True):
        on_character[start:end] += value / (end - start)
    return [float(on_character[start:end].sum()) for start, end in to_spans]


@st.composite
def covering_spans(draw: st.DrawFn, length: int) -> list[Span]:
    cuts = sorted(draw(st.sets(st.integers(1, length - 1)))) if length > 1 else []
    return list(zip([0, *cuts], [*cuts, length], strict=True))


@st.composite
def any_spans(draw: st.DrawFn, length: int) -> list[Span]:
    """Spans in order that may leave gaps, share characters, or be empty."""
    count = draw(st.integers(1, 8))
    ends = sorted(draw(st.lists(st.integers(0, length), min_size=count, max_size=count)))
    starts = sorted(draw(st.lists(st.integers(0, length), min_size=count, max_size=count)))
    return [(min(start, end), end) for start, end in zip(starts, ends, strict=True)]


numbers = st.floats(-100, 100)


@given(st.data(), st.integers(1, 40))
@settings(deadline=None)
def test_carried_values_equal_the_sums_over_characters(data: st.DataObject, length: int) -> None:
    from_spans, to_spans = data.draw(covering_spans(length)), data.draw(covering_spans(length))
    values = data.draw(st.lists(numbers, min_size=len(from_spans), max_size=len(from_spans)))
    expected = naive_carry_over(values, from_spans, to_spans, length)
    assert carry_over(values, from_spans, to_spans) == pytest.approx(expected, abs=1e-9)


@given(st.data(), st.integers(1, 20))
@settings(deadline=None)
def test_totals_are_preserved_whatever_the_spans(data: st.DataObject, length: int) -> None:
    from_spans, to_spans = data.draw(any_spans(length)), data.draw(any_spans(length))
    values = data.draw(st.lists(numbers, min_size=len(from_spans), max_size=len(from_spans)))
    carried = carry_over(values, from_spans, to_spans)
    assert len(carried) == len(to_spans)
    assert sum(carried) == pytest.approx(sum(values), abs=1e-9)


@given(st.data(), st.integers(1, 20))
@settings(deadline=None)
def test_equal_spans_keep_their_values_exactly(data: st.DataObject, length: int) -> None:
    spans = data.draw(any_spans(length))
    values = data.draw(st.lists(numbers, min_size=len(spans), max_size=len(spans)))
    assert carry_over(values, spans, list(spans)) == values


def test_bytes_of_one_character_share_it_in_order() -> None:
    halves = [(0, 1), (0, 1), (1, 2)]
    assert carry_over([8.0, 1.0], [(0, 1), (1, 2)], halves) == pytest.approx([4.0, 4.0, 1.0])
    quarters = [(0, 1)] * 4
    assert carry_over([1.0, 3.0], [(0, 1)] * 2, quarters) == pytest.approx([0.5, 0.5, 1.5, 1.5])


def test_special_tokens_give_to_their_like_else_to_the_next_else_to_the_last() -> None:
    text = [(0, 2), (2, 4)]
    assert carry_over([7.0, 1.0, 2.0, 5.0], [(0, 0), *text, (4, 4)], [(0, 0), *text, (4, 4)]) == [7, 1, 2, 5]
    assert carry_over([7.0, 1.0, 2.0, 5.0], [(0, 0), *text, (4, 4)], text) == pytest.approx([8, 7])
    assert carry_over([1.0, 9.0, 2.0], [(0, 2), (2, 2), (2, 4)], text) == pytest.approx([1, 11])
    assert carry_over([1.0, 2.0], text, [(0, 0), (0, 4), (4, 4)]) == pytest.approx([0, 3, 0])


def test_values_between_two_tokens_go_to_the_next() -> None:
    assert carry_over([1.0, 1.0, 1.0], [(0, 1), (1, 2), (2, 3)], [(0, 1), (2, 3)]) == pytest.approx([1, 2])
    assert carry_over([1.0, 1.0], [(0, 1), (1, 2)], [(0, 1)]) == pytest.approx([2])


def test_impossible_spans_are_refused() -> None:
    with pytest.raises(DataError, match="2 values cannot belong to 1 tokens"):
        carry_over([1.0, 2.0], [(0, 1)], [(0, 1)])
    with pytest.raises(DataError, match="not in the order"):
        carry_over([1.0, 2.0], [(1, 2), (0, 1)], [(0, 2)])
    with pytest.raises(DataError, match="without tokens"):
        carry_over([1.0], [(0, 1)], [])
    assert carry_over([], [], [(0, 1)]) == [0.0]


# locate_tokens


@pytest.mark.parametrize("make", [byte_level, llama_like])
def test_spans_of_features_are_those_of_their_pieces(make: Any) -> None:
    tokenizer = make()
    for row in ROWS:
        (feature,) = tokenizer.tokenize_dataset([row])
        located = locate_tokens(tokenizer.tokenizer, feature["input_ids"])
        assert located.text == row["prompt"] + row["completion"]
        assert located.spans[0] == (0, 0)
        assert located.spans[-1] == (len(located.text), len(located.text))
        covered = {at for start, end in located.spans for at in range(start, end)}
        assert covered == set(range(len(located.text)))
        # No token reaches across the seam, which tokenising the whole text again would not ensure.
        seam = len(row["prompt"])
        is_target = targets_of(feature)
        for (start, end), target in zip(located.spans[1:-1], is_target[1:-1], strict=True):
            assert start >= seam if target else end <= seam


def test_a_character_cut_off_at_the_end_has_no_text() -> None:
    tokenizer = byte_level()
    (feature,) = tokenizer.tokenize_dataset([{"prompt": "a", "completion": "\u4e8c"}])
    cut = list(feature["input_ids"])[:-2]
    located = locate_tokens(tokenizer.tokenizer, cut)
    assert located.text == "a"
    assert located.spans == [(0, 0), (0, 1), (1, 1), (1, 1)]


def test_text_lost_to_unknown_tokens_is_an_error() -> None:
    tokenizer = llama_like(byte_fallback=False).tokenizer
    with pytest.raises(DataError, match=r"llama-like.*'<unk>'"):
        locate_tokens(tokenizer, tokenizer("\ud55c")["input_ids"])


# compare_tokenizers


def test_equal_vocabularies_are_the_same() -> None:
    pair = compare_tokenizers(byte_level(), byte_level())
    assert pair.relation == "same"
    assert "the same as the base's" in pair.describe()


def test_appended_tokens_are_compatible_and_data_that_uses_them_is_an_error() -> None:
    base = byte_level(extra=["<|prefix|>", "<|suffix|>"])
    pair = compare_tokenizers(base, byte_level())
    assert pair.relation == "compatible"
    assert pair.foreign == {330, 331}
    assert "<|prefix|>" in pair.describe()
    pair.require_shared(base.tokenize_dataset(ROWS))
    features = base.tokenize_dataset([*ROWS, {"prompt": "a<|suffix|>", "completion": "b"}])
    with pytest.raises(DataError, match=r"row 4 has token 331 \('<\|suffix\|>'\)") as caught:
        pair.require_shared(features)
    assert "332 tokens" in str(caught.value)
    assert "330 tokens" in str(caught.value)
    # The other way round there is nothing the data could use.
    other_way = compare_tokenizers(byte_level(), base)
    assert (other_way.relation, other_way.foreign) == ("compatible", frozenset())


def test_ids_beyond_the_rows_of_the_other_model_are_foreign() -> None:
    pair = compare_tokenizers(byte_level(), byte_level(), num_rows=328)
    assert pair.relation == "compatible"
    assert pair.foreign == {328, 329}
    assert compare_tokenizers(byte_level(), byte_level(), num_rows=384).relation == "same"


def test_an_end_token_that_the_other_model_does_not_know_rules_out_its_reading_the_ids() -> None:
    base = byte_level(extra=["<|stop|>"], eos_token="<|stop|>")
    assert compare_tokenizers(base, byte_level()).relation == "characters"


def test_other_vocabularies_are_aligned_by_characters() -> None:
    # They begin with the same bytes: a shared beginning is not enough.
    assert compare_tokenizers(byte_level(330), byte_level(300)).relation == "characters"
    pair = compare_tokenizers(byte_level(), llama_like())
    assert pair.relation == "characters"
    assert "by characters" in pair.describe()


def test_a_tokenizer_that_changes_the_text_is_refused_with_both_names() -> None:
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ["abc"],
        trainers.BpeTrainer(
            vocab_size=256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    lower = wrap(core, name_or_path="lower")
    for pair in ((byte_level(), lower), (lower, byte_level())):
        with pytest.raises(UserInputError, match="cannot be aligned") as caught:
            compare_tokenizers(*pair)
        assert "'lower' (256 tokens)" in str(caught.value)
        assert "'bytes-330' (330 tokens)" in str(caught.value)


def test_text_the_other_tokenizer_has_no_tokens_for_is_an_error_with_both_names() -> None:
    base, other = byte_level(), llama_like(byte_fallback=False)
    (feature,) = base.tokenize_dataset([{"prompt": "index", "completion": "\ud55c"}])
    pair = compare_tokenizers(base, base)
    pair = type(pair)(base, other, "characters")
    with pytest.raises(DataError, match=r"no tokens for '\ud55c'") as caught:
        pair.read([feature["input_ids"]], [targets_of(feature)])
    assert "'bytes-330'" in str(caught.value)
    assert "'llama-like'" in str(caught.value)


@pytest.mark.parametrize("base", [byte_level(), llama_like()], ids=["bytes", "llama"])
@pytest.mark.parametrize("other", [byte_level(300, bos=False), llama_like(360)], ids=["bytes", "llama"])
def test_the_other_tokenizer_reads_what_it_would_be_trained_on(base: HfTokenizer, other: HfTokenizer) -> None:
    pair = compare_tokenizers(base, other)
    features = base.tokenize_dataset(ROWS)
    documents = pair.read([f["input_ids"] for f in features], [targets_of(f) for f in features])
    for document, own, row in zip(documents, other.tokenize_dataset(ROWS), ROWS, strict=True):
        if "<|end|>" not in row["completion"]:
            assert document.input_ids == list(own["input_ids"])
        assert document.base_spans[-1] == document.spans[-1]
        assert document.is_known[-1]
        if base.bos_token_id is not None:
            assert not document.is_known[0]


def test_what_the_other_model_sees_first_is_not_known() -> None:
    base = byte_level()
    (feature,) = base.tokenize_dataset([{"prompt": "", "completion": "index = 1"}])
    without = compare_tokenizers(base, byte_level(300, bos=False))
    (document,) = without.read([feature["input_ids"]], [targets_of(feature)])
    first_end = document.spans[0][1]
    for known, (start, end) in zip(document.is_known[1:-1], document.base_spans[1:-1], strict=True):
        assert known == (start >= first_end)
        assert end > start
    (document,) = compare_tokenizers(base, llama_like()).read([feature["input_ids"]], [targets_of(feature)])
    assert document.is_known == [False, *[True] * (len(feature["input_ids"]) - 1)]


def test_tokens_beyond_the_embedding_are_named_and_padding_rows_are_fine() -> None:
    tokenizer = byte_level(extra=["<|prefix|>"])
    require_rows(tokenizer, 384)
    with pytest.raises(UserInputError, match=r"'<\|prefix\|>' with id 330, and the embedding has 330 rows"):
        require_rows(tokenizer, 330)
