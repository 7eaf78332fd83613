"""`unified-model-loader`: every kind of model, among them training checkpoints without their base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from wmtp.components.loader import MICRO_LLAMA, LoadedModel, ModelLoaderContext, UnifiedModelLoader
from wmtp.components.loader.training_state import ARCHITECTURE_KEY, describe_architecture
from wmtp.distributed.checkpoint import save_checkpoint
from wmtp.distributed.checkpoint_store import LocalStore
from wmtp.exceptions import CheckpointError, ModelLoadError
from wmtp.modeling import MTPModel
from wmtp.settings import Config

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_TOKENS = torch.arange(12).reshape(2, 6)


def _model(config: PreTrainedConfig | None = None, **heads: object) -> MTPModel:
    causal_lm = AutoModelForCausalLM.from_config(config or LlamaConfig(**_SIZES))
    model = MTPModel.from_causal_lm(causal_lm, **{"horizon": 3, **heads}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def _save(run: Path, step: int, model: MTPModel, **state: object) -> Path:
    described = {ARCHITECTURE_KEY: describe_architecture(model), "base": None, **state}
    tensors = {"model": dict(model.state_dict()), "rng": {"cpu": torch.zeros(4)}}
    return Path(save_checkpoint(LocalStore(run), step, tensors=tensors, state=described).uri)


def _load(path: Path | str, **context: object) -> LoadedModel:
    return UnifiedModelLoader(Config()).run(ModelLoaderContext(str(path), **context))


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (LlamaConfig(**_SIZES), {}),
        (LlamaConfig(**_SIZES, tie_word_embeddings=True), {"head": "sequential"}),
        (LlamaConfig(**_SIZES), {"head": "medusa", "horizon": 2, "offsets": (1, 4)}),
        (MixtralConfig(**_SIZES, num_local_experts=2), {}),
    ],
)
def test_a_step_loads_without_its_base_bit_for_bit(config, heads, tmp_path: Path) -> None:
    model = _model(config, **heads)
    loaded = _load(_save(tmp_path, 20, model))
    assert loaded.model.offsets == model.offsets
    assert loaded.model.head_form == model.head_form
    assert not loaded.model.causal_lm.training
    wanted, found = model.state_dict(), loaded.model.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    with torch.no_grad():
        assert torch.equal(loaded.model(_TOKENS).logits(), model(_TOKENS).logits())
    assert loaded.metadata["kind"] == "wmtp_checkpoint"
    assert loaded.metadata["horizon"] == model.horizon


@pytest.mark.parametrize("path", ["step", MICRO_LLAMA])
def test_positions_stay_exact_where_the_parameters_have_16_bits(path: str, tmp_path: Path) -> None:
    if path == "step":
        path = str(_save(tmp_path, 20, _model()))
    half, full = (_load(path, dtype=dtype).model.causal_lm for dtype in (torch.bfloat16, torch.float32))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(half.model.rotary_emb.inv_freq, full.model.rotary_emb.inv_freq)


def test_embeddings_that_are_tied_by_name_only_stay_two_from_file_to_step_to_export(tmp_path: Path) -> None:
    """A configuration may say that they are tied while the files hold two: then two are trained."""
    model = _model(LlamaConfig(**_SIZES, tie_word_embeddings=True), horizon=2)
    untied = torch.nn.Parameter(torch.randn(64, 32))
    model.causal_lm.lm_head.weight = untied
    _save(tmp_path, 10, model)
    loaded = _load(tmp_path).model
    assert torch.equal(loaded.unembedding_VD, untied)
    assert torch.equal(loaded.causal_lm.model.embed_tokens.weight, model.causal_lm.model.embed_tokens.weight)
    loaded.save_pretrained(tmp_path / "final")
    exported = _load(tmp_path).model
    for each in (loaded, exported):
        assert torch.equal(each(_TOKENS).logits(), model(_TOKENS).logits())


def test_loading_a_step_draws_no_random_numbers(tmp_path: Path) -> None:
    step = _save(tmp_path, 10, _model())
    before = torch.get_rng_state()
    _load(step)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_folder_gives_its_newest_valid_step_and_then_its_export(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = _model(), _model()
    _save(tmp_path, 10, first)
    damaged = _save(tmp_path, 20, second) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    loaded = _load(tmp_path)
    assert torch.equal(loaded.model(_TOKENS).logits(), first(_TOKENS).logits())
    assert "step-20 was skipped" in caplog.text
    second.save_pretrained(tmp_path / "final")
    loaded = _load(tmp_path)
    assert loaded.metadata["kind"] == "wmtp_export"
    assert torch.equal(loaded.model(_TOKENS).logits(), second(_TOKENS).logits())


def test_a_damaged_step_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    step = _save(tmp_path, 10, _model())
    (step / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        _load(step)


def test_a_step_of_adapters_says_that_it_needs_its_base(tmp_path: Path) -> None:
    step = _save(tmp_path, 10, _model(), base={"a": "1"})
    with pytest.raises(ModelLoadError, match=r"LoRA adapters(.|\n)*recipe of the run"):
        _load(step)


def test_a_step_that_would_run_code_or_does_not_describe_its_model_is_refused(tmp_path: Path) -> None:
    model = _model()
    described = describe_architecture(model)
    described["config"]["auto_map"] = {"AutoModel": "x.Y"}
    with pytest.raises(ModelLoadError, match=r"state\.json has 'auto_map'"):
        _load(_save(tmp_path, 10, model, **{ARCHITECTURE_KEY: described}))
    with pytest.raises(ModelLoadError, match=r"state\.json does not describe the model"):
        _load(_save(tmp_path, 20, model, **{ARCHITECTURE_KEY: None}))


def test_a_step_whose_tensors_do_not_fit_names_the_tensor(tmp_path: Path) -> None:
    model = _model()
    described = describe_architecture(model)
    described["config"]["intermediate_size"] = 40
    step = _save(tmp_path, 10, model, **{ARCHITECTURE_KEY: described})
    with pytest.raises(ModelLoadError, match=r"tensor 'model\.layers\.0\.mlp.*\[40, 32\]"):
        _load(step)


def test_the_kind_is_reported_for_every_model(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path / "export")
    model.causal_lm.save_pretrained(tmp_path / "plain")
    assert _load(tmp_path / "export").metadata == {
        "training_algorithm": "mtp",
        "horizon": 3,
        "offsets": [1, 2, 3],
        "kind": "wmtp_export",
    }
    assert _load(tmp_path / "plain", horizon=2, head="linear").metadata["kind"] == "hugging_face"
    assert _load(MICRO_LLAMA).metadata["kind"] == "builtin"


def test_a_reward_model_is_refused_by_name(tmp_path: Path) -> None:
    _model().causal_lm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="is a reward model"):
        _load(tmp_path)
