"""MicroCode's tokenizer: deterministic, exact in the round trip, short on its own text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from wmtp.evaluation.microcode import build_tokenizer, generate_problems
from wmtp.exceptions import UserInputError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.mark.parametrize("vocab_size", [320, 512])
def test_same_arguments_give_the_same_tokenizer(vocab_size: int) -> None:
    first, second = build_tokenizer(vocab_size), build_tokenizer(vocab_size)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == vocab_size


def test_special_tokens_are_distinct(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(ids) == 3
    assert None not in ids


def test_encoding_adds_no_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("return xs").input_ids
    assert tokenizer.decode(ids) == "return xs"
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_every_program_round_trips(tokenizer: PreTrainedTokenizerFast) -> None:
    for problem in generate_problems(
        split="test", num_problems=200, seed=7, wrong_ratio=0.5, comment_ratio=0.5
    ):
        assert tokenizer.decode(tokenizer(problem.program).input_ids) == problem.program


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_round_trips(text: str) -> None:
    assert SHARED.decode(SHARED(text).input_ids) == text


def test_numbers_are_cut_into_digits_even_with_room_to_merge_them() -> None:
    large = build_tokenizer(1200)
    assert not any(sum(char.isdigit() for char in token) > 1 for token in large.get_vocab())
    assert [token for token in large.tokenize("x % 12 + 3456") if token.isdigit()] == list("123456")


def test_prompt_and_solution_encode_apart_as_they_do_together(tokenizer: PreTrainedTokenizerFast) -> None:
    """Training joins the two encodings; generation continues from the prompt's alone."""
    for problem in generate_problems(split="train", num_problems=200, comment_ratio=0.5):
        apart = tokenizer(problem.prompt).input_ids + tokenizer(problem.solution).input_ids
        assert tokenizer.decode(apart) == problem.program


def test_programs_are_short(tokenizer: PreTrainedTokenizerFast) -> None:
    problems = generate_problems(split="train", num_problems=500)
    prompts = [len(tokenizer(p.prompt).input_ids) for p in problems]
    solutions = [len(tokenizer(p.solution).input_ids) for p in problems]
    assert sum(prompts) / len(prompts) < 30
    assert 15 < sum(solutions) / len(solutions) < 60
    assert max(solutions) < 80


def test_saved_tokenizer_loads_as_it_was(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    program = generate_problems(split="train", num_problems=1, comment_ratio=1.0)[0].program
    assert loaded(program).input_ids == tokenizer(program).input_ids
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert loaded.decode(loaded(program).input_ids) == program


def test_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(UserInputError, match="200"):
        build_tokenizer(200)


SHARED = build_tokenizer()
