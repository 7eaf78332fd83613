"""Batched generation on tiny real models."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from wmtp.decoding import Generation, generate

VOCAB_SIZE = 64
EOS_ID = 2
# Random models seldom choose one given token; with these most rows end, at different times.
END_IDS = [EOS_ID, *range(20, VOCAB_SIZE, 5)]
PIECES = [
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    " ",
    "\n",
    "ab",
    "de",
    "ef",
    "f\n",
    "\nd",
    "def",
    " c",
    "()",
    ":",
    "if",
]


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**common(), "num_key_value_heads": 2, **changes})


def common() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
        "bos_token_id": 1,
        "eos_token_id": EOS_ID,
        "pad_token_id": 0,
        "initializer_range": 0.5,
    }


CONFIGS = {
    "llama": llama_config(),
    "qwen2": Qwen2Config(**common(), num_key_value_heads=2),
    "mistral": MistralConfig(**common(), num_key_value_heads=2, sliding_window=8),
    "gpt2": GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=96,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        pad_token_id=0,
        initializer_range=0.5,
    ),
}


def build_model(config: Any, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build_model(CONFIGS["llama"])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Tokens of one to three ASCII characters, so that most strings can lie across token boundaries."""
    words = ["<pad>", "<bos>", "<eos>", *PIECES]
    words += [chr(ord("A") + i) * 2 for i in range(VOCAB_SIZE - len(words))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def random_prompts(num: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, VOCAB_SIZE) for _ in range(source.randint(1, longest))] for _ in range(num)]


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_transformers_in_float64(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build_model(CONFIGS[family])
    prompts, end_ids = random_prompts(16), END_IDS
    generations = generate(
        model, prompts, tokenizer=tokenizer, max_new_tokens=20, eos_token_ids=end_ids, batch_size=10
    )
    for prompt, generation in zip(prompts, generations, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20,
            eos_token_id=end_ids,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        assert generation.token_ids == expected
        assert generation.finish_reason == ("eos" if expected[-1] in end_ids else "length")
    # Rows were dropped from the batch at different times.
    assert len({len(generation.token_ids) for generation in generations}) > 3


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_rows_tokens_do_not_depend_on_its_batch(
    family: str, temperature: float, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build_model(CONFIGS[family])
    prompts = random_prompts(14)
    keys = [(index // 3, index % 3) for index in range(14)]

    def run(order: list[int], batch_size: int) -> dict[int, Generation]:
        generations = generate(
            model,
            [prompts[i] for i in order],
            tokenizer=tokenizer,
            max_new_tokens=20,
            temperature=temperature,
            keys=[keys[i] for i in order],
            eos_token_ids=END_IDS,
            seed=11,
            batch_size=batch_size,
        )
        return dict(zip(order, generations, strict=True))

    together = run(list(range(14)), 14)
    assert run(list(range(14)), 1) == together
    shuffled = random.Random(1).sample(range(14), 14)
    assert run(shuffled, 7) == together
    assert run(shuffled[:5], 64) == {i: together[i] for i in shuffled[:5]}


def test_draws_depend_on_seed_problem_and_sample_and_on_nothing_else(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = [5, 6, 7]

    def run(keys: list[tuple[int, int]], seed: int = 0) -> list[list[int]]:
        generations = generate(
            llama,
            [prompt] * len(keys),
            tokenizer=tokenizer,
            max_new_tokens=12,
            temperature=1.5,
            keys=keys,
            seed=seed,
        )
        return [generation.token_ids for generation in generations]

    first = run([(0, 0), (0, 1), (1, 0), (0, 0)])
    assert first[0] == first[3]
    assert first[0] != first[1]
    assert first[0] != first[2]
    assert run([(0, 0)], seed=1)[0] != first[0]
    torch.manual_seed(123)
    assert run([(0, 0)])[0] == first[0]


def test_sampled_first_tokens_follow_the_models_distribution_by_a_chi_square_test(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt, temperature, num_samples = [9, 30, 17], 2.0, 4000
    with torch.no_grad():
        logits = llama(torch.tensor([prompt])).logits[0, -1]
    probability = (logits / temperature).softmax(-1)
    generations = generate(
        llama,
        [prompt] * num_samples,
        tokenizer=tokenizer,
        max_new_tokens=1,
        temperature=temperature,
        keys=[(0, sample) for sample in range(num_samples)],
        batch_size=1000,
    )
    tokens = torch.tensor([generation.token_ids[0] for generation in generations])
    counts = torch.bincount(tokens, minlength=VOCAB_SIZE)
    is_common = probability * num_samples > 5
    observed = [*counts[is_common].tolist(), int(counts[~is_common].sum())]
    expected = [*probability[is_common].tolist(), float(probability[~is_common].sum())]
    assert stats.chisquare(observed, [num_samples * share for share in expected]).pvalue > 0.01


def test_stop_strings_end_a_row_wherever_they_lie_relative_to_tokens(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = random_prompts(6)
    settings: dict[str, Any] = {"temperature": 1.2, "eos_token_ids": [], "max_new_tokens": 22}
    free = generate(llama, prompts, tokenizer=tokenizer, **settings)
    num_across = 0
    for start in range(0, 18, 2):
        for length in (1, 2, 3, 7):
            stops = [generation.text[start : start + length] for generation in free]
            stopped = [
                generate(llama, [prompt], tokenizer=tokenizer, stop=[stop], keys=[(i, 0)], **settings)[0]
                for i, (prompt, stop) in enumerate(zip(prompts[:2], stops, strict=False))
            ]
            for whole, stop, generation in zip(free, stops, stopped, strict=False):
                assert generation.finish_reason == "stop"
                assert generation.text == whole.text[: whole.text.index(stop)]
                num_tokens = len(generation.token_ids)
                assert generation.token_ids == whole.token_ids[:num_tokens]
                # The last token is the one that completes the string.
                assert stop in tokenizer.decode(whole.token_ids[:num_tokens])
                assert stop not in tokenizer.decode(whole.token_ids[: num_tokens - 1])
                num_across += stop not in [tokenizer.decode([token]) for token in generation.token_ids]
    assert num_across > 30


def test_the_earliest_of_several_stop_strings_counts_and_the_prompt_is_not_searched(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = random_prompts(1, seed=4)[0]
    settings: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 20, "eos_token_ids": []}
    free = generate(llama, [prompt], **settings)[0]
    early, late = free.text[6:9], free.text[12:16]
    stopped = generate(llama, [prompt], stop=[late, early], **settings)[0]
    assert stopped.text == free.text[: free.text.index(early)]
    # Both of these are complete at the same token.
    inner, outer = free.text[6:9], free.text[4:9]
    assert free.text.index(outer) < free.text.index(inner)
    both = generate(llama, [prompt], stop=[inner, outer], **settings)[0]
    assert both.text == free.text[: free.text.index(outer)]
    in_prompt = tokenizer.decode(prompt)[-2:]
    assert in_prompt not in free.text
    assert generate(llama, [prompt], stop=[in_prompt, ""], **settings)[0] == free


def test_end_of_sequence_token_is_kept_in_the_tokens_and_not_in_the_text(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = random_prompts(30)
    settings: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 25}
    free = generate(llama, prompts, eos_token_ids=[], **settings)
    ended = generate(llama, prompts, eos_token_ids=END_IDS, **settings)
    for whole, generation in zip(free, ended, strict=True):
        ends = [i for i, token in enumerate(whole.token_ids) if token in END_IDS]
        if ends:
            end = ends[0]
            assert generation.token_ids == whole.token_ids[: end + 1]
            assert generation.text == tokenizer.decode(whole.token_ids[:end], skip_special_tokens=True)
            assert generation.finish_reason == "eos"
        else:
            assert generation == whole
    assert sum(generation.finish_reason == "eos" for generation in ended) > 5


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 8, 9])
def test_a_row_never_has_more_than_its_budget(
    max_new_tokens: int, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    settings: dict[str, Any] = {"tokenizer": tokenizer, "eos_token_ids": []}
    prompts = random_prompts(3)
    whole = generate(llama, prompts, max_new_tokens=12, **settings)
    cut = generate(llama, prompts, max_new_tokens=max_new_tokens, **settings)
    assert [c.token_ids for c in cut] == [w.token_ids[:max_new_tokens] for w in whole]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_context_length_bounds_prompt_and_new_tokens_together(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build_model(CONFIGS[family])
    prompts = [[5] * length for length in (90, 94, 95, 96, 120, 3)]
    generations = generate(
        model, prompts, tokenizer=tokenizer, max_new_tokens=20, eos_token_ids=[], context_length=96
    )
    assert [len(generation.token_ids) for generation in generations] == [6, 2, 1, 0, 0, 20]
    assert {generation.finish_reason for generation in generations} == {"length"}
    alone = generate(model, prompts[:1], tokenizer=tokenizer, max_new_tokens=6, eos_token_ids=[])
    assert generations[0] == alone[0]


def test_the_blank_of_an_indented_completion_survives_a_sentencepiece_style_tokenizer(
    llama: PreTrainedModel,
) -> None:
    words = {"<eos>": 0, "▁x": 1, "▁y": 2, "z": 3, "▁": 4, "\n": 5}
    words |= {f"▁w{i}": i for i in range(6, VOCAB_SIZE)}
    backend = Tokenizer(models.WordLevel(words, unk_token="▁x"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    metaspace = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    generation = generate(
        llama, [[3, 3]], tokenizer=metaspace, max_new_tokens=8, temperature=3.0, eos_token_ids=[]
    )[0]
    pieces = metaspace.convert_ids_to_tokens(generation.token_ids)
    assert pieces[0].startswith("▁")  # which decoding the completion alone would strip
    assert generation.text == "".join(pieces).replace("▁", " ")


def test_every_submodule_gets_its_mode_back_and_dropout_is_off_meanwhile(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = build_model(llama_config(attention_dropout=0.9)).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    graph_modes: set[bool] = set()
    hook = model.register_forward_hook(lambda *_: graph_modes.add(torch.is_inference_mode_enabled()))
    prompts = random_prompts(4)
    first = generate(model, prompts, tokenizer=tokenizer, max_new_tokens=10)
    assert [module.training for module in model.modules()] == modes
    assert generate(model, prompts, tokenizer=tokenizer, max_new_tokens=10) == first
    assert graph_modes == {True}
    hook.remove()
    model.train()
    model(torch.tensor([[1, 2]])).logits.sum().backward()  # generation left no inference tensors behind


def test_on_done_is_called_once_for_every_row(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: dict[int, Generation] = {}

    def note(index: int, generation: Generation) -> None:
        assert index not in seen
        seen[index] = generation

    prompts = [*random_prompts(11), [5] * 40]
    generations = generate(
        llama,
        prompts,
        tokenizer=tokenizer,
        max_new_tokens=9,
        batch_size=4,
        context_length=40,
        on_done=note,
    )
    assert [seen[index] for index in range(12)] == generations


def test_no_prompts_give_no_generations(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert generate(llama, [], tokenizer=tokenizer, max_new_tokens=4) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -1.0}, "temperature"),
        ({"keys": [(0, 0)]}, "1 keys for 2 prompts"),
        ({"prompts_ids": [[3], []]}, "prompt 1 has no tokens"),
    ],
)
def test_arguments_out_of_range_are_refused(
    changes: dict[str, Any], message: str, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    arguments: dict[str, Any] = {
        "prompts_ids": [[3], [4]],
        "tokenizer": tokenizer,
        "max_new_tokens": 4,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        generate(llama, **arguments)
