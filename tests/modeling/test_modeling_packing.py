"""Packed documents equal the same documents alone, for trunk and all heads."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_families import FAMILIES, VOCAB_SIZE, build_mtp, random_tokens

from wmtp.exceptions import UserInputError
from wmtp.modeling import MTPModel
from wmtp.modeling.packing import plan_attention

DOCUMENTS = [[5, 7, 2], [9, 7]]  # lengths in each row; row 0 ends in two tokens of padding


def _pack(rows: list[list[int]], length: int = 16) -> torch.Tensor:
    ids = torch.full((len(rows), length), -1)
    for row, lengths in enumerate(rows):
        start = 0
        for document, size in enumerate(lengths):
            ids[row, start : start + size] = document
            start += size
    return ids


def _assert_documents_equal_alone(
    model: MTPModel, tokens: torch.Tensor, ids: torch.Tensor, **extra: torch.Tensor
) -> None:
    with torch.no_grad():
        packed = model(tokens, document_ids=ids, **extra)
        for row in range(len(ids)):
            for document in range(int(ids[row].max()) + 1):
                where = ids[row] == document
                alone = model(tokens[row][where][None])
                torch.testing.assert_close(
                    packed.hidden_BSHD[row][where], alone.hidden_BSHD[0], rtol=0, atol=1e-5
                )
                torch.testing.assert_close(
                    packed.trunk_BSD[row][where], alone.trunk_BSD[0], rtol=0, atol=1e-5
                )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"attn_implementation": "eager"}], ids=["default", "eager"])
def test_packed_equals_unpacked_for_every_document_and_head(family: str, changes: dict) -> None:
    model = build_mtp(family, **changes)
    _assert_documents_equal_alone(model, random_tokens(), _pack(DOCUMENTS))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_mask_and_positions_given_beside_document_ids_do_not_break_the_isolation(family: str) -> None:
    model = build_mtp(family)
    ids = _pack(DOCUMENTS)
    positions = torch.tensor([[*range(5), *range(7), 0, 1, 0, 0], [*range(9), *range(7)]])
    extra = {"attention_mask": (ids >= 0).long(), "position_ids": positions}
    _assert_documents_equal_alone(model, random_tokens(), ids, **extra)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_an_earlier_document_gets_no_gradient_from_a_later_one(family: str) -> None:
    model = build_mtp(family)
    model(random_tokens(1), document_ids=_pack([[6, 10]]))  # checks the model, without gradients, once
    embeddings: list[torch.Tensor] = []

    def keep(_module: object, _inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        embeddings.append(output)

    model.causal_lm.get_input_embeddings().register_forward_hook(keep)
    out = model(random_tokens(1), document_ids=_pack([[6, 10]]))
    out.hidden_BSHD[0, 6:].square().sum().backward()
    assert torch.count_nonzero(embeddings[0].grad[0, :6]) == 0
    assert torch.count_nonzero(embeddings[0].grad[0, 6:]) > 0


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3))
def test_any_packing_isolates_its_documents(rows: list[list[int]]) -> None:
    torch.manual_seed(0)
    model = build_mtp("gemma2", horizon=2)
    _assert_documents_equal_alone(model, random_tokens(len(rows), 20), _pack(rows, 20))


def test_single_token_documents_are_isolated() -> None:
    _assert_documents_equal_alone(build_mtp("llama"), random_tokens(1, 6), _pack([[1, 1, 1, 3]], 6))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_left_padding_gives_the_values_of_the_unpadded_text(family: str) -> None:
    model = build_mtp(family)
    tokens = random_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    with torch.no_grad():
        alone = model(tokens[1:, 5:]).hidden_BSHD[0]
        by_mask = model(tokens, attention_mask=mask).hidden_BSHD[1, 5:]
        by_documents = model(tokens, document_ids=mask - 1).hidden_BSHD[1, 5:]
    torch.testing.assert_close(by_mask, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_documents, alone, rtol=0, atol=1e-5)


def test_one_document_a_row_takes_the_fast_path_without_any_mask() -> None:
    model = build_mtp("llama")
    tokens, ids = random_tokens(), _pack([[16], [10]])
    positions = torch.arange(16).expand(2, 16).where(ids >= 0, 0)
    with torch.no_grad():
        out = model(tokens, attention_mask=(ids >= 0).long(), position_ids=positions, document_ids=ids)
        assert out.trunk.layer_arguments.keyword["attention_mask"] is None
        assert torch.equal(out.hidden_BSHD[0], model(tokens).hidden_BSHD[0])
        alone = model(tokens[1:, :10]).hidden_BSHD[0]
    torch.testing.assert_close(out.hidden_BSHD[1, :10], alone, rtol=0, atol=1e-5)


def test_other_positions_in_a_single_document_are_honoured() -> None:
    model = build_mtp("gpt2")
    tokens, ids = random_tokens(1, 8), _pack([[6]], 8)
    positions = torch.tensor([[3, 5, 7, 9, 11, 13, 0, 0]])
    with torch.no_grad():
        out = model(tokens, position_ids=positions, document_ids=ids).hidden_BSHD[:, :6]
        expected = model(tokens[:, :6], torch.ones(1, 6), positions[:, :6]).hidden_BSHD
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_document_that_starts_at_a_later_position_keeps_it_and_stays_isolated() -> None:
    model = build_mtp("gpt2")
    tokens, ids = random_tokens(1, 8), _pack([[4, 4]], 8)
    positions = torch.tensor([[0, 1, 2, 3, 20, 21, 22, 23]])
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, document_ids=ids).hidden_BSHD[:, 4:]
        alone = model(tokens[:, 4:], position_ids=positions[:, 4:]).hidden_BSHD
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_that_only_the_mask_shows_is_not_part_of_the_document(family: str) -> None:
    model = build_mtp(family)
    tokens, mask = random_tokens(1, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        padded = model(tokens, attention_mask=mask, document_ids=torch.zeros(1, 8, dtype=torch.long))
        alone = model(tokens[:, 3:]).hidden_BSHD
    torch.testing.assert_close(padded.hidden_BSHD[:, 3:], alone, rtol=0, atol=1e-5)


def test_positions_given_for_padding_do_not_join_it_to_the_document() -> None:
    model = build_mtp("gpt2")
    tokens, ids = random_tokens(1, 8), torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 0]])
    positions = torch.arange(8)[None]
    with torch.no_grad():
        padded = model(tokens, position_ids=positions, document_ids=ids).hidden_BSHD[:, 2:]
        alone = model(tokens[:, 2:], position_ids=positions[:, 2:]).hidden_BSHD
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_positions_that_run_on_over_a_boundary_are_refused() -> None:
    with pytest.raises(UserInputError, match="position_ids do not follow document_ids"):
        build_mtp("llama")(
            random_tokens(1, 8), position_ids=torch.arange(8)[None], document_ids=_pack([[4, 4]], 8)
        )


def test_default_positions_restart_in_every_document() -> None:
    plan = plan_attention(None, None, torch.tensor([[0, 0, 0, 1, 1, -1], [-1, 0, 0, 0, 1, 2]]))
    assert plan.position_ids_BS.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 0]]
    assert plan.attention_mask_BS is None


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "document_ids"])
def test_a_wrong_shape_is_named(name: str) -> None:
    with pytest.raises(UserInputError, match=rf"{name} has shape \(2, 15\)"):
        build_mtp("llama")(random_tokens(), **{name: torch.zeros(2, 15, dtype=torch.long)})


_RECURRENT = {
    "mamba": transformers.MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2),
    "jamba": transformers.JambaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        pad_token_id=0,
    ),
}


@pytest.mark.parametrize("name", _RECURRENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_with_recurrent_layers_refuse_packing_only(name: str, dtype: torch.dtype) -> None:
    causal_lm = transformers.AutoModelForCausalLM.from_config(_RECURRENT[name]).eval()
    if not (name == "mamba" and dtype is torch.bfloat16):  # the CPU code of Mamba has no 16 bits
        causal_lm = causal_lm.to(dtype)
    model = MTPModel.from_causal_lm(causal_lm, horizon=2)
    tokens = random_tokens()
    assert model(tokens, document_ids=_pack([[16], [9]])).hidden_BSHD.shape == (2, 16, 2, 32)
    with pytest.raises(UserInputError, match="packed"):
        model(tokens, document_ids=_pack(DOCUMENTS))


def test_attention_that_ignores_positions_in_its_mask_refuses_packing() -> None:
    config = transformers.OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    model = MTPModel.from_causal_lm(transformers.OPTForCausalLM(config), horizon=2)
    with pytest.raises(UserInputError, match="carries information from one packed document"):
        model(random_tokens(), document_ids=_pack(DOCUMENTS))
