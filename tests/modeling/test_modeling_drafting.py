"""Self-speculation says what head 0 says, and its heads draft what they would without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from drafting_reference import (
    FAMILIES,
    FORMS,
    VOCAB_SIZE,
    build_drafting_model,
    naive_greedy,
    naive_speculation,
    random_prompts,
)
from modeling_families import build_causal_lm, perturb

from wmtp.decoding import DraftTree, GenerationCounts, Speculation, generate
from wmtp.decoding.speculation import SpeculativeBatch
from wmtp.exceptions import UserInputError
from wmtp.modeling import MTPModel
from wmtp.modeling.drafting import HeadsSession

CONTEXT = 64


def run(
    model: MTPModel,
    prompts: Sequence[Sequence[int]],
    num_new: int,
    *,
    speculative: bool = True,
    widths: Sequence[int] | None = None,
    token_ids: Sequence[int] | None = None,
    batch_size: int = 8,
    end_ids: Sequence[int] = (),
) -> tuple[list[list[int]], GenerationCounts]:
    counts = GenerationCounts(accepted_per_head=[0] * model.horizon)
    generations = generate(
        model.causal_lm,
        prompts,
        tokenizer=None,
        max_new_tokens=num_new,
        eos_token_ids=end_ids,
        batch_size=batch_size,
        context_length=CONTEXT,
        speculation=Speculation(model, widths, token_ids) if speculative else None,
        counts=counts,
    )
    return [generation.token_ids for generation in generations], counts


class _Recorder:
    """Notes every block of drafts: (prompt, number of new tokens so far) -> tokens of its nodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: dict[tuple[tuple[int, ...], int], list[int]] = {}
        draft = SpeculativeBatch._draft

        def draft_and_note(batch: SpeculativeBatch) -> None:
            draft(batch)
            for prompt, num_new, block in zip(
                batch._prompts, batch._num_new, batch._block_BT.tolist(), strict=True
            ):
                self.blocks[tuple(prompt), num_new] = block

        monkeypatch.setattr(SpeculativeBatch, "_draft", draft_and_note)


def check_against_reference(
    model: MTPModel,
    num_prompts: int,
    num_new: int,
    widths: Sequence[int],
    monkeypatch: pytest.MonkeyPatch,
    *,
    batch_size: int = 3,
) -> list[int]:
    """Compare tokens, every single draft and acceptance; returns the counts."""
    recorder = _Recorder(monkeypatch)
    prompts = random_prompts(num_prompts, 11, vocab_size=len(model.unembedding_VD))
    tokens, counts = run(model, prompts, num_new, widths=widths, batch_size=batch_size)
    tree = DraftTree.of_widths(widths)
    total = [0] * model.horizon
    for prompt, new in zip(prompts, tokens, strict=True):
        assert new == naive_greedy(model, prompt, num_new)
        row_counts, drafted = naive_speculation(model, prompt, new, widths)
        total = [count + more for count, more in zip(total, row_counts, strict=True)]
        for position, candidates in drafted.items():
            drafts = [
                candidates[depth - 1][rank]
                for depth, rank in zip(tree.depths[1:], tree.ranks[1:], strict=True)
            ]
            assert recorder.blocks[tuple(prompt), position] == [new[position - 1], *drafts]
    assert counts.accepted_per_head == total
    assert counts.num_tokens == num_prompts * num_new
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["transformer", "sequential"])
def test_tokens_drafts_and_acceptance_are_those_of_a_reference_without_cache(
    family: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_against_reference(build_drafting_model(family, form), 2, 8, (1, 1, 1), monkeypatch)


@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize(
    ("form", "widths"),
    [
        ("transformer", (1, 1, 1)),
        ("transformer", (3, 2, 2)),
        ("transformer", (4,)),
        ("linear", (1, 1, 1)),
        ("linear", (3, 3, 2)),
        ("medusa", (1, 1, 1)),
        ("medusa", (4, 2, 2)),
        ("sequential", (1, 1, 1)),
        ("sequential", (1, 1)),
    ],
)
def test_chains_and_trees_of_every_form_draft_and_accept_what_the_reference_does(
    form: str, widths: tuple[int, ...], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_drafting_model("llama", form, scale=scale)
    counts = check_against_reference(model, 4, 14, widths, monkeypatch)
    # Some drafts stand and some fall.
    assert 0 < counts[1] < counts[0]


@pytest.mark.parametrize(("batch_size", "widths"), [(1, (1, 1, 1)), (2, (1, 1))])
def test_sequential_depths_run_on_the_block_where_enough_of_it_stands(
    batch_size: int, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_windows = 0
    layer_arguments_at = HeadsSession.layer_arguments_at

    def count(session: HeadsSession, *arguments: Any) -> Any:
        nonlocal num_windows
        num_windows += 1
        return layer_arguments_at(session, *arguments)

    monkeypatch.setattr(HeadsSession, "layer_arguments_at", count)
    # Of four tokens a draft is often the right one.
    model = build_drafting_model("llama", "sequential", vocab_size=4)
    counts = check_against_reference(model, 8, 24, widths, monkeypatch, batch_size=batch_size)
    assert num_windows < 0.9 * counts[0] / batch_size


@pytest.mark.parametrize(
    ("family", "form"), [*(("llama", form) for form in FORMS), ("gemma3", "transformer")]
)
def test_hundreds_of_prompts_in_ragged_batches_give_the_tokens_of_plain_decoding(
    family: str, form: str
) -> None:
    model = build_drafting_model(family, form)
    prompts = random_prompts(48, 20, seed=2)
    end_ids = [5]
    plain, _ = run(model, prompts, 24, speculative=False, end_ids=end_ids, batch_size=24)
    assert run(model, prompts, 24, end_ids=end_ids, batch_size=24)[0] == plain
    if form != "sequential":
        assert run(model, prompts, 24, end_ids=end_ids, widths=(2, 2, 1), batch_size=24)[0] == plain
    # Rows ended at different times, so they were dropped in the middle.
    assert len({len(tokens) for tokens in plain}) > 2


@pytest.mark.parametrize(
    ("family", "form"),
    [*(("llama", form) for form in FORMS), ("gpt2", "transformer"), ("mistral", "sequential")],
)
def test_prompts_that_are_stored_ahead_change_nothing(
    family: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_drafting_model(family, form)
    prompts = random_prompts(6, 30, seed=3)
    whole = run(model, prompts, 16)
    monkeypatch.setattr("wmtp.decoding.speculation._WHOLE_PROMPT_TOKENS", 0)
    ahead = run(model, prompts, 16)
    assert ahead == whole
    assert run(model, [[7]], 8)[0] == [naive_greedy(model, [7], 8)]


@pytest.mark.parametrize(
    ("form", "widths"),
    [*((form, (1, 1, 1)) for form in FORMS), ("transformer", (3, 2, 1)), ("linear", (2, 2, 2))],
)
def test_what_a_single_row_has_not_written_is_never_read(
    form: str, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_drafting_model("llama", form)
    prompts = random_prompts(6, 12, seed=9)
    expected, counts = run(model, prompts, 12, widths=widths)

    def unwritten(like: torch.Tensor, *shape: Any) -> torch.Tensor:
        return torch.full(shape[0] if len(shape) == 1 else shape, torch.nan, dtype=like.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", unwritten)
    alone = run(model, prompts, 12, widths=widths, batch_size=1)
    assert alone[0] == expected
    assert alone[1].accepted_per_head == counts.accepted_per_head
    # Prompts that are stored ahead.
    monkeypatch.setattr("wmtp.decoding.speculation._WHOLE_PROMPT_TOKENS", 0)
    assert run(model, prompts, 12, widths=widths, batch_size=1)[0] == expected


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_rows_fill_the_context_to_its_last_position(family: str) -> None:
    model = build_drafting_model(family, "transformer")
    prompts = [*random_prompts(4, 50, seed=4), [9] * 63, [9] * 64, [9] * 70]
    plain, _ = run(model, prompts, 100, speculative=False)
    assert run(model, prompts, 100)[0] == plain
    assert [len(prompt) + len(new) for prompt, new in zip(prompts, plain, strict=True)] == [64] * 6 + [70]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_fp32_every_first_mismatch_is_a_near_tie(family: str) -> None:
    model = build_drafting_model(family, "transformer").float()
    prompts = random_prompts(8, 12, seed=5)
    plain, _ = run(model, prompts, 12, speculative=False)
    speculative, _ = run(model, prompts, 12)
    reference = model.double()
    for prompt, first, second in zip(prompts, plain, speculative, strict=True):
        for position, (ours, other) in enumerate(zip(first, second, strict=True)):
            if ours != other:
                logits = reference.causal_lm(torch.tensor([[*prompt, *first[:position]]])).logits[0, -1]
                top = logits.topk(2).values
                assert top[0] - top[1] < 1e-4
                break


@pytest.mark.parametrize("form", ["transformer", "linear"])
def test_drafting_from_a_part_of_the_vocabulary_changes_the_drafts_alone(form: str) -> None:
    model = build_drafting_model("granite", form)
    prompts = random_prompts(8, seed=6)
    tokens, all_counts = run(model, prompts, 24)
    assert run(model, prompts, 24, token_ids=range(VOCAB_SIZE)) == (tokens, all_counts)
    said = {token for row in tokens for token in row}
    never_said = [token for token in range(VOCAB_SIZE) if token not in said]
    other_tokens, counts = run(model, prompts, 24, token_ids=never_said)
    assert other_tokens == tokens
    assert counts.accepted_per_head == [8 * 24, 0, 0, 0]
    some_tokens, some_counts = run(model, prompts, 24, token_ids=[11, 3, 6, 3])
    assert some_tokens == tokens
    assert some_counts.accepted_per_head[1] > 0
    assert all_counts.accepted_per_head[1] > 0


def test_heads_that_are_right_are_accepted_to_the_last() -> None:
    # Layers that add nothing, and an unembedding that leads from each token to the next: head h = h steps.
    model = build_drafting_model("llama", "linear", scale=0.0)
    with torch.no_grad():
        for layer in model.decoder_layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = torch.nn.init.orthogonal_(torch.empty(VOCAB_SIZE, 32).double())
        model.causal_lm.get_input_embeddings().weight.copy_(embedding)
        model.final_norm.weight.fill_(1)
        model.unembedding_VD.copy_(embedding)
    tokens, counts = run(model, [[11]], 17, batch_size=1)
    assert tokens == [[11] * 17]
    assert counts.accepted_per_head == [5, 4, 4, 4]
    assert counts.num_forwards == 5
    assert counts.tokens_per_forward == 17 / 5
    assert counts.acceptance == [1, 0.8, 0.8, 0.8]


# ---------------------------------------------------------------- what cannot draft


def build(horizon: int = 4, **options: object) -> MTPModel:
    return MTPModel.from_causal_lm(build_causal_lm("llama"), horizon=horizon, **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: build(1), "one head"),
        (lambda: build(adapter="teacher_forcing"), "teacher-forced heads"),
        (lambda: build(3, offsets=[1, 2, 4]), r"offsets \[1, 2, 4\]"),
    ],
)
def test_a_model_that_cannot_draft_says_why(model, message: str) -> None:
    with pytest.raises(UserInputError, match=message) as caught:
        run(model(), [[3, 4]], 4)
    assert "speculative=False" in str(caught.value.remedy)


def test_attention_that_takes_no_dense_mask_is_refused() -> None:
    model = build()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserInputError, match="flex_attention"):
        run(model, [[3, 4]], 4)


@pytest.mark.filterwarnings("ignore")
def test_the_fallback_to_one_head_refuses_too() -> None:
    with pytest.raises(UserInputError, match="one head"):
        run(build(adapter="fallback"), [[3, 4]], 4)


def test_layers_whose_state_cannot_be_rolled_back_are_refused_and_plain_decoding_works() -> None:
    config = transformers.JambaConfig(
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
    )
    model = MTPModel.from_causal_lm(transformers.AutoModelForCausalLM.from_config(config), horizon=2)
    with pytest.raises(UserInputError, match="jamba has layers"):
        run(model, [[3, 4]], 4)
    assert len(run(model, [[3, 4]], 4, speculative=False)[0][0]) == 4


def test_a_family_that_takes_no_masks_is_refused() -> None:
    config = transformers.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4)
    model = MTPModel.from_causal_lm(transformers.AutoModelForCausalLM.from_config(config), horizon=2)
    with pytest.raises(UserInputError, match="BloomForCausalLM cannot be run on blocks"):
        run(model, [[3, 4]], 4)


class _PositionBlindLlama(transformers.LlamaForCausalLM):
    """Counts positions from the length of its input, whatever it is told."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        self.model.rotary_emb.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {"position_ids": torch.arange(kwargs["position_ids"].shape[1])[None]},
            ),
            with_kwargs=True,
        )


def test_a_model_that_ignores_positions_is_noticed_by_what_it_computes() -> None:
    causal_lm = _PositionBlindLlama(build_causal_lm("llama").config)
    perturb(causal_lm)
    with pytest.raises(UserInputError, match="other results for a block"):
        run(MTPModel.from_causal_lm(causal_lm, horizon=2), [[3, 4]], 4)


@pytest.mark.parametrize(
    ("form", "widths", "message"),
    [
        ("transformer", (1, 1, 1, 1), "4 heads, and 3"),
        ("transformer", (), "0 heads"),
        ("transformer", (1, 0), "widths are"),
        ("transformer", (20, 20, 20), "more than 256 nodes"),
        ("sequential", (2, 1), "no alternatives"),
    ],
)
def test_a_tree_that_cannot_be_drafted_is_refused(form: str, widths: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        run(build(head=form), [[3, 4]], 4, widths=widths)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [([], "there is none"), ([3, 97], "97 among"), ([-1], "-1"), ([4], "2 alternatives")],
)
def test_bad_tokens_to_draft_from_are_refused(token_ids: list[int], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        run(build(), [[3, 4]], 4, widths=(2, 1), token_ids=token_ids)


def test_hooks_and_layers_are_as_before_also_after_an_error() -> None:
    model = build_drafting_model("llama", "sequential")
    layers = list(model.decoder_layers)

    def state() -> tuple[object, ...]:
        last = model.last_layer
        return len(last._forward_hooks), len(last._forward_pre_hooks), list(model.base_model.layers) == layers

    before = state()
    run(model, [[3, 4]], 4)
    assert state() == before
    with pytest.raises(IndexError):
        run(model, [[VOCAB_SIZE]], 4)
    assert state() == before
    assert model.training is False


def test_a_model_that_takes_no_padding_is_not_decoded_in_batches() -> None:
    model = build_drafting_model("gemma2", "linear")
    assert model.config._attn_implementation == "eager"
    prompts = random_prompts(8, 24)
    with pytest.raises(UserInputError, match="Gemma2ForCausalLM answers NaN where prompts are padded"):
        run(model, prompts, 2, speculative=False)
    assert run(model, prompts, 2, speculative=False, batch_size=1)[0] == run(model, prompts, 2)[0]
    # Broken weights are another matter, which the finite gate tells of.
    torch.nn.init.constant_(model.final_norm.weight, torch.nan)
    assert run(model, prompts, 2, speculative=False)[0] == [[0, 0]] * 8


# ---------------------------------------------------------------- thousands


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_thousands_of_prompts_of_all_families_give_the_tokens_of_plain_decoding(
    family: str, form: str
) -> None:
    """19 families x 4 forms x 2 models x 32 prompts: 4864 prompts, and as many as trees."""
    for seed, scale in ((7, 0.3), (8, 0.0)):
        model = build_drafting_model(family, form, scale=scale)
        prompts = random_prompts(32, 24, seed=seed)
        # Eager attention takes no padding in float64.
        plain_batch = 1 if family == "gemma2" else 32
        plain, _ = run(model, prompts, 32, speculative=False, batch_size=plain_batch, end_ids=[5])
        assert run(model, prompts, 32, batch_size=16, end_ids=[5])[0] == plain
        if form != "sequential":
            assert run(model, prompts, 32, batch_size=32, widths=(3, 2, 1), end_ids=[5])[0] == plain
