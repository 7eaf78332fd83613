"""Rho-1 with a reference that has a tokenizer of its own: sums over documents, boundaries, training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wmtp.components.data import MTPDataCollator
from wmtp.components.scorer import ScorerContext, ScorerSetup
from wmtp.components.scorer.reference import aligned_losses
from wmtp.components.scorer.rho1 import Rho1ExcessScorer
from wmtp.components.tokenizer import HfTokenizer, TokenizerSettings
from wmtp.components.tokenizer.pairs import TokenizerPair, compare_tokenizers
from wmtp.exceptions import DataError, UserInputError
from wmtp.modeling import MTPModel
from wmtp.pipelines import run_training_pipeline
from wmtp.pipelines.outputs import RunOptions
from wmtp.pipelines.validation import validate_settings
from wmtp.settings import Config, Recipe
from wmtp.tracking import read_metrics

SOURCE = Path(json.__file__).read_text(encoding="utf-8")
ROWS = [
    {"prompt": "def add(first, second):\n    ", "completion": "return first + second\n"},
    {"prompt": "# \ud55c\uad6d\uc5b4", "completion": "\U0001f600\u00e9\n\tx  = 1"},
    {"prompt": "", "completion": "for index in range(10):\n\tprint(index)\n"},
    {"prompt": "x", "completion": "y"},
    {"prompt": "import json\n\n\n", "completion": "value = json.loads(text)\n"},
]


def trained_tokenizer(
    vocabulary: int, *, bos: bool = True, extra: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [SOURCE],
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<begin>", "<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.add_special_tokens(list(extra))
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<begin>", eos_token="<end>", name_or_path=f"bytes-{vocabulary}"
    )


def component(tokenizer: PreTrainedTokenizerFast, *, train_on_prompt: bool = False) -> HfTokenizer:
    return HfTokenizer(TokenizerSettings(tokenizer=tokenizer, train_on_prompt=train_on_prompt))


def tiny_llama(vocabulary: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def naive_reference_losses(model: MTPModel, feature: Any) -> torch.Tensor:
    """Loss of each token of one document, read alone; the first is not predicted."""
    ids = torch.tensor([list(feature["input_ids"])])
    logits = model.causal_lm(ids).logits[0].double()
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    return torch.cat([losses.new_zeros(1), losses]).detach()


def batch_of(tokenizer: HfTokenizer, bins: list[list[Any]]) -> dict[str, Any]:
    return MTPDataCollator({"tokenizer": tokenizer.tokenizer, "horizon": 2, "pad_to_multiple_of": 8})(bins)


def context_of(batch: dict[str, Any]) -> ScorerContext:
    return ScorerContext(batch, None, batch["document_ids"] >= 0)


@pytest.mark.parametrize("bos", [True, False], ids=["with-begin", "without-begin"])
@pytest.mark.parametrize("packing", [[[0, 1], [2, 3, 4]], [[0], [1], [2], [3], [4]], [[4, 3, 2, 1, 0]]])
@torch.no_grad()
def test_reference_losses_of_each_document_add_up_to_the_references_own(
    bos: bool, packing: list[list[int]]
) -> None:
    base = component(trained_tokenizer(400))
    reference_tokenizer = component(trained_tokenizer(330, bos=bos))
    pair = compare_tokenizers(base, reference_tokenizer)
    assert pair.relation == "characters"
    reference = MTPModel.from_causal_lm(tiny_llama(330, 1), horizon=1)
    features, own = base.tokenize_dataset(ROWS), reference_tokenizer.tokenize_dataset(ROWS)
    bins = [[features[index] for index in row] for row in packing]
    batch = batch_of(base, bins)
    losses_BS, known_BS = aligned_losses(reference, pair, context_of(batch))
    assert losses_BS.shape == batch["input_ids"].shape
    assert losses_BS.dtype == torch.float32
    for row, indices in enumerate(packing):
        for number, index in enumerate(indices):
            in_document = batch["document_ids"][row] == number
            expected = naive_reference_losses(reference, own[index])
            assert losses_BS[row, in_document].sum().item() == pytest.approx(expected.sum().item(), rel=1e-5)
            # What the model learns, and what it is given: nothing crosses from one to the other.
            is_target = in_document & (batch["token_labels"][row] != -100)
            own_target = torch.tensor([label != -100 for label in own[index]["labels"]])
            target_sum = expected[own_target].sum().item()
            assert losses_BS[row, is_target].sum().item() == pytest.approx(target_sum, rel=1e-5)
    assert not losses_BS[batch["document_ids"] < 0].any()
    assert not known_BS[batch["document_ids"] < 0].any()


@torch.no_grad()
def test_losses_are_spread_evenly_over_the_characters_of_the_references_tokens() -> None:
    base, other = component(trained_tokenizer(300)), component(trained_tokenizer(420))
    reference = MTPModel.from_causal_lm(tiny_llama(420, 1), horizon=1)
    (feature,), (own,) = base.tokenize_dataset(ROWS[:1]), other.tokenize_dataset(ROWS[:1])
    batch = batch_of(base, [[feature]])
    losses_BS, known_BS = aligned_losses(reference, compare_tokenizers(base, other), context_of(batch))
    # Prompt and completion are ASCII, so a token's characters are those it decodes to.
    on_characters: list[float] = []
    expected = naive_reference_losses(reference, own).tolist()
    for token_id, loss in zip(own["input_ids"][1:-1], expected[1:-1], strict=True):
        length = len(other.tokenizer.decode([token_id]))
        on_characters += [loss / length] * length
    at = 0
    for position, token_id in enumerate(feature["input_ids"][1:-1], 1):
        end = at + len(base.tokenizer.decode([token_id]))
        assert losses_BS[0, position].item() == pytest.approx(sum(on_characters[at:end]), rel=1e-4)
        at = end
    last = len(feature["input_ids"]) - 1
    assert losses_BS[0, last].item() == pytest.approx(expected[-1], rel=1e-5)
    assert known_BS[0, : last + 1].tolist() == [False, *[True] * last]


def scorer_for(pair: TokenizerPair | None, model: MTPModel, reference: MTPModel) -> Rho1ExcessScorer:
    train = {"algo": "rho1-wmtp", "max_steps": 1}
    recipe = Recipe.model_validate({"train": train, "data": {"train": {"sources": ["x"]}}})
    scorer = Rho1ExcessScorer(recipe)
    scorer.prepare(ScorerSetup(model=model, reference=reference, tokenizers=pair))
    return scorer


@torch.no_grad()
def test_the_same_vocabulary_gives_bitwise_what_it_gave_without_a_comparison() -> None:
    base = component(trained_tokenizer(330))
    model = MTPModel.from_causal_lm(tiny_llama(330, 0), horizon=1)
    reference = MTPModel.from_causal_lm(tiny_llama(330, 1), horizon=1)
    batch = batch_of(base, [base.tokenize_dataset(ROWS)])
    output = model(batch["input_ids"], document_ids=batch["document_ids"], num_heads=1)
    context = ScorerContext(batch, output, batch["document_ids"] >= 0)
    pair = compare_tokenizers(base, component(trained_tokenizer(330)), num_rows=330)
    assert pair.relation == "same"
    compared = scorer_for(pair, model, reference).run(context).values
    assert torch.equal(compared, scorer_for(None, model, reference).run(context).values)
    # Aligned by characters, equal tokens keep their values.
    by_characters = TokenizerPair(base, base, "characters")
    aligned = scorer_for(by_characters, model, reference).run(context).values
    torch.testing.assert_close(aligned, compared, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tokens_that_the_reference_cannot_judge_have_no_excess() -> None:
    base = component(trained_tokenizer(400), train_on_prompt=True)
    other = component(trained_tokenizer(330, bos=False))
    model = MTPModel.from_causal_lm(tiny_llama(400, 0), horizon=1)
    reference = MTPModel.from_causal_lm(tiny_llama(330, 1), horizon=1)
    batch = batch_of(base, [base.tokenize_dataset([ROWS[2]])])
    output = model(batch["input_ids"], num_heads=1)
    context = ScorerContext(batch, output, batch["document_ids"] >= 0)
    pair = compare_tokenizers(base, other)
    _, known_BS = aligned_losses(reference, pair, context)
    excess_BS = scorer_for(pair, model, reference).run(context).values
    assert known_BS[0, :2].tolist() == [False, False]
    assert not excess_BS[~known_BS].any()
    assert excess_BS[known_BS].abs().min() > 0


# Through the pipeline


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, *, rows: int, seed: int) -> str:
    tiny_llama(rows, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_data(folder: Path) -> str:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS * 4), encoding="utf-8")
    return str(file)


def settings_for(tmp_path: Path, base: str, reference: str, **train: Any) -> tuple[Config, Recipe]:
    config = Config.model_validate(
        {
            "paths": {
                "models": {"base": base, "ref": reference},
                "datasets": {"custom": write_data(tmp_path)},
                "output": str(tmp_path / "out"),
            },
            "devices": {"accelerator": "cpu", "precision": "fp32", "num_threads": 1},
        }
    )
    recipe = Recipe.model_validate(
        {
            "train": {"algo": "rho1-wmtp", "max_steps": 3, "log_every_steps": 1},
            "model": {"mtp": {"horizon": 2}},
            "data": {"train": {"sources": ["custom"], "batch_size": 2, "max_length": 64, **train}},
            "optim": {"lr": 1e-3, "warmup_steps": 1},
            "eval": {"datasets": []},
        }
    )
    return config, recipe


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "unpacked"])
def test_training_with_a_reference_of_another_tokenizer(tmp_path: Path, pack: bool) -> None:
    base = save_model(tmp_path / "base", trained_tokenizer(400), rows=408, seed=0)
    reference = save_model(tmp_path / "ref", trained_tokenizer(330, bos=False), rows=330, seed=1)
    config, recipe = settings_for(tmp_path, base, reference, pack_sequences=pack)
    findings = {
        finding.subject: finding.detail for finding in validate_settings(config, recipe, RunOptions())
    }
    assert findings["reference tokenizer"].startswith(
        "another one (330 tokens): values are carried over by characters"
    )
    run_training_pipeline(config, recipe, options=RunOptions(run_name="run"))
    history = [row for row in read_metrics(tmp_path / "out/reports/run/metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in history] == [1, 2, 3]
    assert all(row["train/weight_std"] > 0 for row in history)


def test_a_reference_with_fewer_rows_is_compatible_until_the_data_uses_one(tmp_path: Path) -> None:
    extended = trained_tokenizer(400, extra=["<prefix>", "<suffix>"])
    base = save_model(tmp_path / "base", extended, rows=402, seed=0)
    reference = save_model(tmp_path / "ref", trained_tokenizer(400), rows=400, seed=1)
    config, recipe = settings_for(tmp_path, base, reference)
    findings = {
        finding.subject: finding.detail for finding in validate_settings(config, recipe, RunOptions())
    }
    assert findings["reference tokenizer"].startswith("compatible: all but 2 of the base's tokens")
    run_training_pipeline(config, recipe, options=RunOptions(run_name="run"))
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("\n" + json.dumps({"prompt": "a<suffix>", "completion": "b"}))
    with pytest.raises(DataError, match=r"token 401 \('<suffix>'\)"):
        run_training_pipeline(config, recipe, options=RunOptions(run_name="other"))


def test_a_tokenizer_with_more_tokens_than_the_base_has_rows_stops_before_training(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", trained_tokenizer(400), rows=390, seed=0)
    reference = save_model(tmp_path / "ref", trained_tokenizer(400), rows=400, seed=1)
    config, recipe = settings_for(tmp_path, base, reference)
    with pytest.raises(UserInputError, match=r"10 token\(s\) that the model does not.*390 rows"):
        run_training_pipeline(config, recipe, options=RunOptions(run_name="run"))
    assert not (tmp_path / "out/reports").exists()
