"""Reward models: scores of every prefix, two layouts on disk, and heads that are never made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.modeling.formats.reward import derive_llama_config, read_starling
from wmtp.modeling.formats.tensors import StoredTensor, StoredTensors
from wmtp.modeling.reward_model import RewardModel, load_reward_model

VOCAB_SIZE, PAD, BOS = 97, 0, 1
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "num_labels": 1,
}
_GPT = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SIZES),
    "mistral": ("MistralConfig", {**_SIZES, "sliding_window": 4}),
    "gemma2": ("Gemma2Config", {**_SIZES, "head_dim": 8, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", _SIZES),
    "mixtral": ("MixtralConfig", {**_SIZES, "num_local_experts": 2}),
    "gpt2": ("GPT2Config", {**_GPT, "pad_token_id": PAD, "num_labels": 1}),
}


def _perturb(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _classifier(family: str) -> PreTrainedModel:
    name, sizes = CLASSIFIERS[family]
    model = AutoModelForSequenceClassification.from_config(getattr(transformers, name)(**sizes)).eval()
    _perturb(model)
    return model


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    _classifier("llama").save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def _right_padded() -> tuple[Tensor, Tensor]:
    """Rows of 9, 4 and 1 tokens; none of them is the padding token, which transformers' pooling needs."""
    ids_BS = torch.randint(3, VOCAB_SIZE, (3, 9))
    mask_BS = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    return ids_BS.where(mask_BS, PAD), mask_BS.long()


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_scores_are_those_of_transformers_at_the_last_token_and_at_every_prefix(
    family: str, tmp_path: Path
) -> None:
    wanted = _classifier(family)
    wanted.save_pretrained(tmp_path)
    model = load_reward_model(tmp_path)
    ids_BS, mask_BS = _right_padded()
    output = model(ids_BS, mask_BS)
    assert output.token_scores_BS.dtype == output.pooled_B.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(output.pooled_B, wanted(ids_BS, attention_mask=mask_BS).logits[:, 0])
        for row, length in enumerate((9, 4, 1)):
            for end in range(1, length + 1):
                # A row by itself and cut off there: no padding, no later tokens.
                prefix_score = wanted(ids_BS[row : row + 1, :end]).logits[0, 0]
                torch.testing.assert_close(output.token_scores_BS[row, end - 1], prefix_score)
            assert torch.equal(output.token_scores_BS[row, length:], torch.zeros(9 - length))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_on_the_left_changes_no_score(family: str, tmp_path: Path) -> None:
    _classifier(family).save_pretrained(tmp_path)
    model = load_reward_model(tmp_path)
    ids_BS, mask_BS = _right_padded()
    right = model(ids_BS, mask_BS)
    for row, length in enumerate((9, 4, 1)):
        shifted_ids_BS = ids_BS[row].roll(9 - length)[None]
        shifted_mask_BS = mask_BS[row].roll(9 - length)[None]
        left = model(shifted_ids_BS, shifted_mask_BS)
        torch.testing.assert_close(left.pooled_B[0], right.pooled_B[row])
        torch.testing.assert_close(left.token_scores_BS[0, 9 - length :], right.token_scores_BS[row, :length])


def test_the_last_token_comes_from_the_mask_even_where_padding_has_the_id_of_a_real_token(
    classifier: Path,
) -> None:
    # Padding with the beginning-of-sequence token: a search for the padding id would stop at token 0.
    model = load_reward_model(classifier)
    ids = torch.tensor([[BOS, 5, BOS, 7, BOS, BOS]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    output = model(ids, mask)
    alone = model(ids[:, :4])
    torch.testing.assert_close(output.pooled_B, alone.pooled_B)
    torch.testing.assert_close(output.pooled_B, output.token_scores_BS[:, 3])
    assert not torch.allclose(output.pooled_B, output.token_scores_BS[:, 1])
    # Nor is a text cut short that ends with tokens of that id.
    torch.testing.assert_close(model(ids).pooled_B, model(ids, torch.ones_like(ids)).token_scores_BS[:, -1])


def test_a_row_without_tokens_is_refused(classifier: Path) -> None:
    with pytest.raises(UserInputError, match="without tokens"):
        load_reward_model(classifier)(
            torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]])
        )


def test_a_reward_model_is_frozen_and_stays_in_evaluation_mode(classifier: Path) -> None:
    model = load_reward_model(classifier, dtype=torch.bfloat16)
    model.train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.base.parameters()} == {torch.bfloat16}
    output = model(torch.tensor([[3, 4]]))
    assert output.token_scores_BS.dtype == torch.float32
    assert not output.pooled_B.requires_grad


def _edit_tensors(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("score.weight"), r"no reward head: the tensor 'score\.weight' is missing"),
        (lambda t: t.update({"score.weight": torch.zeros(2, 32)}), r"'score\.weight' has shape \[2, 32\]"),
        (lambda t: t.update({"score.weight": torch.zeros(1, 31)}), r"'score\.weight' has shape \[1, 31\]"),
        (lambda t: t["score.weight"][0, 3].fill_(float("nan")), r"'score\.weight' has values that are NaN"),
        (lambda t: t.pop("model.norm.weight"), r"lacks the tensor 'norm\.weight'"),
        (lambda t: t.update({"model.norm.weight": torch.ones(9)}), r"another shape.*'norm\.weight'"),
        (lambda t: t.update({"score.bias": torch.ones(1)}), r"unexpected tensor 'score\.bias'"),
    ],
)
def test_a_head_or_decoder_that_is_missing_or_wrong_is_an_error_naming_file_and_tensor(
    edit: Callable[[dict[str, Tensor]], object], message: str, classifier: Path
) -> None:
    _edit_tensors(classifier / "model.safetensors", edit)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_reward_model(classifier)
    assert str(classifier) in str(caught.value)


def test_a_classifier_with_several_labels_is_no_reward_model(classifier: Path) -> None:
    config = json.loads((classifier / "config.json").read_text())
    config["id2label"] = {"0": "bad", "1": "good"}
    config["label2id"] = {"bad": 0, "good": 1}
    (classifier / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="2 labels"):
        load_reward_model(classifier)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**_SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="no reward head"):
        load_reward_model(tmp_path)


def test_rotary_buffers_of_older_versions_are_left_out(classifier: Path) -> None:
    tokens = torch.tensor([[3, 4, 5]])
    before = load_reward_model(classifier)(tokens)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _edit_tensors(classifier / "model.safetensors", lambda t: t.update({name: torch.ones(4)}))
    assert torch.equal(load_reward_model(classifier)(tokens).pooled_B, before.pooled_B)


class GPTRewardModel(nn.Module):
    """What the layout is a state dict of, and what its scores are, with the mask for the end."""

    def __init__(self, causal_lm: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = causal_lm
        self.transformer = causal_lm.model
        self.v_head = nn.Linear(causal_lm.config.hidden_size, 1, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score of each row."""
        hidden = self.transformer(input_ids, attention_mask=attention_mask)[0]
        rewards = self.v_head(hidden).squeeze(-1)
        return torch.stack(
            [row[mask.nonzero()[-1, 0]] for row, mask in zip(rewards, attention_mask, strict=True)]
        )


def _starling(theta: float = 5000.0, **changes: Any) -> GPTRewardModel:
    rope = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(**{**_SIZES, "rms_norm_eps": 1e-5, "rope_parameters": rope, **changes})
    model = GPTRewardModel(LlamaForCausalLM(config)).eval()
    _perturb(model)
    return model


def _state_with_buffers(model: GPTRewardModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state dict as an older version of transformers saved it."""
    inv_freq = model.transformer.rotary_emb.inv_freq.to(dtype)
    names = [f"{prefix}layers.{i}" for prefix in ("model.model.", "transformer.") for i in range(2)]
    buffers = {f"{name}.self_attn.rotary_emb.inv_freq": inv_freq for name in names}
    return {**model.state_dict(), **buffers}


def _stored(tensors: dict[str, Tensor]) -> StoredTensors:
    return StoredTensors(
        StoredTensor(name, "file", tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    )


def _write(state: dict[str, Tensor], directory: Path, config: LlamaConfig | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    torch.save(state, directory / "starling_RM.pth")
    if config is not None:
        config.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("has_config", [True, False])
def test_starling_scores_are_those_of_the_module_it_is_a_state_dict_of(
    has_config: bool, tmp_path: Path
) -> None:
    wanted = _starling()
    path = _write(_state_with_buffers(wanted), tmp_path, wanted.model.config if has_config else None)
    model = load_reward_model(path)
    ids_BS, mask_BS = _right_padded()
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BS, mask_BS).pooled_B, wanted(ids_BS, mask_BS))
        prefix = model(ids_BS, mask_BS).token_scores_BS[0, 4]
        torch.testing.assert_close(prefix, wanted(ids_BS[:1, :5], mask_BS[:1, :5])[0])


def test_copies_saved_apart_and_a_single_copy_are_read_alike(tmp_path: Path) -> None:
    wanted = _starling()
    state = {name: tensor.clone() for name, tensor in _state_with_buffers(wanted).items()}
    tokens = torch.tensor([[3, 4, 5]])
    scores = load_reward_model(_write(state, tmp_path / "two"))(tokens).pooled_B
    one = {name: tensor for name, tensor in state.items() if not name.startswith("model.")}
    assert torch.equal(load_reward_model(_write(one, tmp_path / "one"))(tokens).pooled_B, scores)
    by_file = load_reward_model(tmp_path / "one" / "starling_RM.pth")
    assert torch.equal(by_file(tokens).pooled_B, scores)


def test_copies_that_differ_are_an_error_naming_the_tensor(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in _state_with_buffers(_starling()).items()}
    name = "layers.1.mlp.up_proj.weight"
    state[f"transformer.{name}"][0, 0] += 1
    with pytest.raises(ModelLoadError, match=rf"model\.model\.{name}.*transformer\.{name}.*differ"):
        load_reward_model(_write(state, tmp_path))
    del state[f"transformer.{name}"]
    with pytest.raises(ModelLoadError, match=rf"lacks the tensor 'transformer\.{name}'"):
        load_reward_model(_write(state, tmp_path))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("v_head.weight"), r"starling_RM\.pth, which has no tensor 'v_head\.weight\'"),
        (lambda s: s.update({"v_head.weight": torch.zeros(32)}), r"'v_head\.weight' has shape \[32\]"),
        (lambda s: s.update({"v_head.bias": torch.zeros(1)}), r"unexpected tensor 'v_head\.bias'"),
        (
            lambda s: [s.pop(f"{p}norm.weight") for p in ("model.model.", "transformer.")],
            r"lacks the tensor 'norm\.weight'",
        ),
    ],
)
def test_a_starling_file_that_is_incomplete_or_of_another_model_is_an_error(
    edit: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    state = _state_with_buffers(_starling())
    edit(state)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_reward_model(_write(state, tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6, 5432.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_size_and_rotary_base_are_told_from_old_buffers(theta: float, dtype: torch.dtype) -> None:
    model = _starling(theta, head_dim=16, num_key_value_heads=4)
    state = _state_with_buffers(model, dtype)
    decoder = {
        name.removeprefix("transformer."): tensor
        for name, tensor in state.items()
        if name.startswith("transformer.")
    }
    found = derive_llama_config("file", _stored(decoder).stored())
    given = model.model.config
    assert found.head_dim == 16
    precision = 1e-4 if dtype == torch.float32 or theta != 5432.1 else 2e-2
    assert found.rope_parameters["rope_theta"] == pytest.approx(theta, rel=precision)
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
    ):
        assert getattr(found, name) == getattr(given, name), name


def test_llama_2_is_assumed_only_where_the_shapes_are_its_own() -> None:
    def decoder(vocabulary: int, hidden: int, key_rows: int) -> dict[str, Tensor]:
        layer = "layers.31."
        return {
            "embed_tokens.weight": torch.empty(vocabulary, hidden, device="meta"),
            "layers.0.self_attn.q_proj.weight": torch.empty(hidden, hidden, device="meta"),
            "layers.0.self_attn.k_proj.weight": torch.empty(key_rows, hidden, device="meta"),
            "layers.0.mlp.gate_proj.weight": torch.empty(11008, hidden, device="meta"),
            f"{layer}mlp.gate_proj.weight": torch.empty(11008, hidden, device="meta"),
        }

    config = derive_llama_config("file", _stored(decoder(32000, 4096, 4096)).stored())
    assert (config.head_dim, config.num_attention_heads, config.num_key_value_heads) == (128, 32, 32)
    assert (config.num_hidden_layers, config.rms_norm_eps) == (32, 1e-5)
    assert config.rope_parameters["rope_theta"] == 10000.0
    # Code Llama and Llama 3 have other rotary bases; heads of 64 do not divide into heads of 128.
    for vocabulary, hidden, key_rows in ((32016, 4096, 4096), (128256, 4096, 1024), (32000, 4096, 64)):
        with pytest.raises(ModelLoadError, match=r"(?s)file.*config\.json"):
            derive_llama_config("file", _stored(decoder(vocabulary, hidden, key_rows)).stored())


def test_scaled_rotary_frequencies_ask_for_a_configuration() -> None:
    state = _state_with_buffers(_starling(head_dim=16, num_key_value_heads=4))
    scaled = torch.cat([torch.ones(4), torch.logspace(-2, -5, 4)])
    for name in [name for name in state if name.endswith("inv_freq")]:
        state[name] = scaled
    with pytest.raises(ModelLoadError, match=r"(?s)rotary.*config\.json"):
        read_starling("file", None, _stored(state), dtype=torch.float32)


def test_a_starling_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"v_head.weight": RewardModel}, tmp_path / "starling_RM.pth")
    with pytest.raises(ModelLoadError, match=r"starling_RM\.pth"):
        load_reward_model(tmp_path)


def test_a_missing_directory_is_named() -> None:
    with pytest.raises(ModelLoadError, match="no/such/folder"):
        load_reward_model("./no/such/folder")
