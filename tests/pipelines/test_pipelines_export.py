"""Exports of runs, steps and models: what is written, what it says of itself, and who can use it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
import torch
import yaml
from huggingface_hub import ModelCard as HubCard
from test_pipelines_matrix import run_cli, train_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from s3_server import S3Server
from wmtp.evaluation.microcode import build_tokenizer
from wmtp.exceptions import CheckpointError, UserInputError
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.meta_native_write import write_native
from wmtp.pipelines.checkpoints import locate_model
from wmtp.pipelines.export import ExportOptions, run_export_pipeline
from wmtp.pipelines.provenance import describe_run, hub_id, public_name
from wmtp.settings import Config, Recipe
from wmtp.storage import verify_manifest

CONFIGS = Path(__file__).parents[1] / "configs"


@cache
def _tokenizer() -> object:
    return build_tokenizer()


def _micro_model(**config: object) -> MTPModel:
    """A tiny random Llama for MicroCode's tokenizer, with heads that all differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.3}
    causal_lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(_tokenizer()), **sizes, **ids, **config))
    model = MTPModel.from_causal_lm(causal_lm, horizon=3)
    with torch.no_grad():
        for parameter in model.extra_heads.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    _micro_model().save_pretrained(tmp_path / "model", tokenizer=_tokenizer())
    return tmp_path / "model"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a base that lies in a folder of this machine, with two checkpoints."""
    root = tmp_path_factory.mktemp("machine")
    _micro_model(max_position_embeddings=512).save_pretrained(root / "tiny-base", tokenizer=_tokenizer())
    rows = root / "private" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text('{"prompt": "def f(x):", "completion": "    return x + 1"}\n' * 40)
    arguments = train_arguments("mtp_baseline", root / "out", "--run-name", "one", "--max-steps", "4")
    for override in (
        f"paths.models.base={root / 'tiny-base'}",
        f"data.train.sources=[{rows}]",
        "train.save_every_steps=2",
        "model.mtp.horizon=3",
        "eval.types=[meta-mtp, perplexity]",
    ):
        arguments += ["--set", override]
    assert run_cli(*arguments) == 0
    return root / "out" / "models" / "one"


def _same_tensors(one: Path, other: Path) -> None:
    left, right = (MTPModel.from_pretrained(path).state_dict() for path in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_step_needs_no_config_and_gives_the_model_of_the_run(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "step-4"
    shutil.copytree(run / "step-4", moved)
    shutil.copytree(run / "tokenizer", moved.parent / "tokenizer")
    outputs = run_export_pipeline(str(moved), tmp_path / "step")
    assert (outputs.head, outputs.offsets, outputs.dtype) == ("transformer", (1, 2, 3), "fp32")
    _same_tensors(outputs.folder, run / "final")
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        assert json.loads((outputs.folder / name).read_text()) == json.loads(
            (run / "final" / name).read_text()
        )
    metadata = json.loads((outputs.folder / "wmtp.json").read_text())["metadata"]
    assert (metadata["steps"], metadata["algorithm"], metadata["base"]) == (4, "baseline-mtp", "tiny-base")


def test_a_run_folder_is_its_finished_model_and_without_one_its_newest_step(
    run: Path, tmp_path: Path
) -> None:
    assert run_export_pipeline(str(run), tmp_path / "finished").source == str(run / "final")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("final", "step-4"))
    outputs = run_export_pipeline(str(unfinished), tmp_path / "newest")
    assert outputs.source == str(unfinished / "step-2")
    steps = json.loads((tmp_path / "newest" / "wmtp.json").read_text())["metadata"]["steps"]
    assert steps == 2


def test_a_step_with_adapters_is_put_on_its_base_and_merged(run: Path, tmp_path: Path) -> None:
    base = run.parents[2] / "tiny-base"
    arguments = train_arguments("mtp_baseline", tmp_path, "--run-name", "lora", "--max-steps", "2")
    for override in (
        f"paths.models.base={base}",
        "model.lora.rank=2",
        "eval.datasets=[]",
        "model.mtp.horizon=3",
    ):
        arguments += ["--set", override]
    assert run_cli(*arguments) == 0
    outputs = run_export_pipeline(str(tmp_path / "models/lora/step-2"), tmp_path / "merged")
    _same_tensors(outputs.folder, tmp_path / "models/lora/final")
    trained, before = (
        AutoModelForCausalLM.from_pretrained(path).model.layers[0].self_attn.q_proj.weight
        for path in (outputs.folder, base)
    )
    assert not torch.equal(trained, before)


def test_a_damaged_step_is_an_error_and_writes_nothing(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "step-4", tmp_path / "step-4")
    with (tmp_path / "step-4" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        run_export_pipeline(str(tmp_path / "step-4"), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_card_of_a_run_says_how_it_was_made_and_where_nothing_lay(run: Path) -> None:
    card = HubCard((run / "final" / "README.md").read_text())
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"wmtp", "multi-token-prediction", "baseline-mtp"} <= set(data["tags"])
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_type, result.metric_value) == ("pass@1", "microcode", 0.0)
    # A folder's name could be somebody else's model on the hub.
    assert "base_model" not in data
    text = card.text
    for shown in (
        "`tiny-base`",
        "`rows.jsonl`",
        "`baseline-mtp`",
        "1, 2, 3",
        "`microcode`, pass@1",
        "0% to 0%",
    ):
        assert shown in text
    for shown in ("`perplexity_head_2`", "save_every_steps: 2", "MTPModel.from_pretrained", "## Licence"):
        assert shown in text
    for file in (run / "final").iterdir():
        assert str(run.parents[2]).encode() not in file.read_bytes(), file
    assert verify_manifest(run / "final") == []


def test_an_export_of_an_export_keeps_what_is_known_of_it(run: Path, tmp_path: Path) -> None:
    outputs = run_export_pipeline(str(run / "final"), tmp_path / "half", options=ExportOptions(dtype="bf16"))
    card = (outputs.folder / "README.md").read_text()
    for shown in ("| Precision | bf16 |", "`tiny-base`", "`microcode`, pass@1", "# half"):
        assert shown in card
    again = run_export_pipeline(str(outputs.folder), tmp_path / "again")
    assert again.dtype == "bf16"
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "half/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "fp32"), ("fp16", "fp16"), ("bf16", "bf16")])
def test_a_plain_loader_finds_the_precision_that_was_asked_for(
    model: Path, tmp_path: Path, dtype: str, expected: str
) -> None:
    outputs = run_export_pipeline(str(model), tmp_path / "out", options=ExportOptions(dtype=dtype))
    assert outputs.dtype == expected
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[expected]
    original = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, original[name].to(tensor.dtype)), name


def test_the_first_heads_can_be_written_alone(model: Path, tmp_path: Path) -> None:
    run_export_pipeline(str(model), tmp_path / "out", options=ExportOptions(horizon=2))
    whole, part = MTPModel.from_pretrained(model), MTPModel.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 12).unsqueeze(0)
    assert torch.equal(part(ids).logits(), whole(ids).logits()[:, :, :2])
    with pytest.raises(UserInputError, match="has 3 heads, 4 were asked for"):
        run_export_pipeline(str(model), tmp_path / "more", options=ExportOptions(horizon=4))


def test_metas_layout_and_back_is_exact_and_takes_the_sentencepiece_file_along(
    model: Path, tmp_path: Path
) -> None:
    (model / "tokenizer.model").write_bytes(b"any SentencePiece file")
    native = run_export_pipeline(str(model), tmp_path / "native", options=ExportOptions(format="meta"))
    assert {"consolidated.pth", "params.json", "tokenizer.model", "README.md"} <= native.files.keys()
    assert native.notes == []
    _same_tensors(native.folder, model)
    assert "library_name" not in HubCard((native.folder / "README.md").read_text()).data.to_dict()
    (native.folder / "tokenizer.model").unlink()
    back = run_export_pipeline(str(native.folder), tmp_path / "back")
    _same_tensors(back.folder, model)
    assert "no tokenizer" in back.notes[0]


def test_the_sentencepiece_file_survives_the_way_over_hugging_face_and_back(tmp_path: Path) -> None:
    (file,) = Path(mistral_common.__file__).parent.glob("data/tokenizer.model.v1")
    model = MTPModel.from_causal_lm(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
            )
        ),
        horizon=2,
    )
    write_native(model, tmp_path / "repository" / "7B_1T_2")
    shutil.copy(file, tmp_path / "repository" / "tokenizer.model")
    hugging_face = run_export_pipeline(str(tmp_path / "repository" / "7B_1T_2"), tmp_path / "hf")
    assert {"tokenizer.json", "tokenizer.model"} <= hugging_face.files.keys()
    text = "def f(x):\n    return  x"
    expected = sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(text, add_bos=True)
    assert AutoTokenizer.from_pretrained(hugging_face.folder)(text)["input_ids"] == expected
    native = run_export_pipeline(
        str(hugging_face.folder), tmp_path / "native", options=ExportOptions(format="meta")
    )
    assert native.notes == []
    assert (native.folder / "tokenizer.model").read_bytes() == file.read_bytes()
    _same_tensors(native.folder, tmp_path / "repository" / "7B_1T_2")


def test_a_native_model_is_evaluated_from_its_folder_and_exported_in_its_own_precision(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native = tmp_path / "native"
    options = ExportOptions(format="meta", dtype="bf16")
    run_export_pipeline(str(model), native, options=options)
    assert locate_model(Config(), str(native)).path == str(native)
    assert not locate_model(Config(), str(native)).is_training_state
    again = run_export_pipeline(str(native), tmp_path / "again", options=ExportOptions(format="meta"))
    assert again.dtype == run_export_pipeline(str(native), tmp_path / "hf").dtype == "bf16"
    settings = ("--config", str(CONFIGS / "config.local_test.yaml"))
    settings += ("--recipe", str(CONFIGS / "recipe.mtp_baseline.yaml"), "--set", "model.mtp.horizon=3")
    evaluation = ("eval", *settings, "--checkpoint", str(native), "--dry-run")
    assert run_cli(*evaluation) == 2
    assert "no tokenizer can be loaded" in (shown := " ".join(capsys.readouterr().err.split()))
    assert "it holds: README.md, consolidated.pth" in shown
    assert run_cli(*evaluation, "--set", f"model.tokenizer.path={model}") == 0


@pytest.mark.s3
def test_a_model_on_s3_is_exported_with_its_tokenizer_and_credentials_of_the_environment(
    model: Path, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "tokenizer.model").write_bytes(b"any SentencePiece file")
    target = f"{s3_server.bucket}/{tmp_path.name}"
    for file in model.iterdir():
        s3_server.filesystem().put_file(str(file), f"{target}/run/final/{file.name}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url)
    exported = run_export_pipeline(f"s3://{target}/run", tmp_path / "hf")
    assert exported.source == f"s3://{target}/run/final"
    assert {"tokenizer.json", "wmtp.json"} <= exported.files.keys()
    _same_tensors(exported.folder, model)
    native = run_export_pipeline(
        f"s3://{target}/run", tmp_path / "meta", options=ExportOptions(format="meta")
    )
    assert (native.folder / "tokenizer.model").read_bytes() == b"any SentencePiece file"


def test_what_metas_layout_cannot_hold_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    causal_lm = _micro_model().causal_lm
    MTPModel.from_causal_lm(causal_lm, horizon=2, head="medusa").save_pretrained(tmp_path / "model")
    with pytest.raises(UserInputError, match="medusa"):
        run_export_pipeline(str(tmp_path / "model"), tmp_path / "out", options=ExportOptions(format="meta"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_output_that_is_taken_is_only_replaced_by_force_and_only_a_model(
    model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    run_export_pipeline(str(model), output)
    before = (output / "manifest.json").read_bytes()
    with pytest.raises(UserInputError, match="exists already"):
        run_export_pipeline(str(model), output, options=ExportOptions(dtype="bf16"))
    assert (output / "manifest.json").read_bytes() == before
    run_export_pipeline(str(model), output, options=ExportOptions(dtype="bf16", force=True))
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    thesis = tmp_path / "documents" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(UserInputError, match="holds no model"):
        run_export_pipeline(str(model), thesis.parent, options=ExportOptions(force=True))
    assert thesis.read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "model", "out"]


@pytest.mark.parametrize("place", ["model", "model/inside", ".", "link"])
def test_the_source_is_never_written_into(model: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(model)
    before = {path: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(UserInputError, match="lie in each other"):
        run_export_pipeline(str(model), tmp_path / place, options=ExportOptions(force=True))
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_a_place_that_cannot_be_written_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserInputError, match=r"file/out cannot be written"):
        run_export_pipeline(str(model), tmp_path / "file" / "out")
    with pytest.raises(UserInputError, match="is a file"):
        run_export_pipeline(str(model), tmp_path / "file")
    with pytest.raises(UserInputError, match="not a local folder"):
        run_export_pipeline(str(model), "s3://bucket/out")


def test_all_bad_options_are_named_at_once() -> None:
    with pytest.raises(UserInputError, match=r"'gguf'.*'int4'.*horizon is 0"):
        ExportOptions(format="gguf", dtype="int4", horizon=0)


def test_names_for_publication_hide_where_things_lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert public_name("/home/me/models/llama") == "llama"
    assert public_name("/home/me/runs/models/first/final") == "first"
    assert public_name("/home/me/runs/models/first/step-20") == "first-step-20"
    assert public_name("s3://secret-bucket/team/llama") == "llama"
    assert public_name("codellama/CodeLlama-7b-Python-hf") == "codellama/CodeLlama-7b-Python-hf"
    assert hub_id("facebook/multi-token-prediction:7B_200B_4") == "facebook/multi-token-prediction"
    assert hub_id("/home/me/models/llama") is None
    recipe = Recipe.model_validate(
        {
            "train": {"algo": "baseline-mtp", "max_steps": 7},
            "model": {"tokenizer": {"path": "/home/me/tokenizer"}},
            "data": {"train": {"sources": ["mbpp", "/home/me/rows.jsonl", "org/rows"]}},
        }
    )
    config = Config.model_validate({"paths": {"datasets": {"mbpp": "google-research-datasets/mbpp"}}})
    described = describe_run(config, recipe, "codellama/CodeLlama-7b-Python-hf")
    assert "/home" not in json.dumps(described)
    assert described["base_model"] == "codellama/CodeLlama-7b-Python-hf"
    assert described["data"] == ["mbpp", "rows.jsonl", "org/rows"]
    assert described["datasets"] == ["google-research-datasets/mbpp", "org/rows"]


# ------------------------------------------------------------------------------- a program that knows no WMTP

# No context ends in a blank: lm_eval would count it to the choice.
_CHOICES = [
    {"context": "def f(x):", "choices": ["\n    return x", "\n    return 1 +", "import"], "answer": 0},
    {"context": "Add two numbers\ndef add(a, b):", "choices": [" pass", "\n    return a + b"], "answer": 1},
    {"context": "x =", "choices": [" [1, 2]", " y\n", " None\n\n"], "answer": 2},
]
_TASK = {
    "task": "local_choices",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
_PROGRAM = """
import sys
sys.modules["wmtp"] = None  # any import of it fails
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
assert not [name for name in sys.modules if name.startswith("wmtp.")]
"""


def _run_lm_eval(export: Path, folder: Path) -> dict:
    """Evaluate an export in a process of its own, offline; returns its results and its samples."""
    (folder / "tasks").mkdir(parents=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in _CHOICES))
    task = {**_TASK, "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    (folder / "tasks" / "local_choices.yaml").write_text(yaml.safe_dump(task))
    arguments = (
        f"--model hf --model_args pretrained={export},dtype=float32 --tasks local_choices --device cpu "
        f"--include_path {folder / 'tasks'} --output_path {folder / 'out'} --log_samples --batch_size 2"
    )
    caches = {name: str(folder / "cache") for name in ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments.split()],
        env={**os.environ, **caches, **offline},
        capture_output=True,
        text=True,
        timeout=240,
        cwd=folder,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    return {
        "acc": json.loads(results.read_text())["results"]["local_choices"]["acc,none"],
        "samples": [json.loads(line) for line in samples.read_text().splitlines()],
    }


@torch.no_grad()
def _log_likelihood(model: MTPModel, context: str, continuation: str) -> float:
    """Of the continuation's tokens under head 0, in float64."""
    num_context = len(_tokenizer()(context).input_ids)
    ids = torch.tensor([_tokenizer()(context + continuation).input_ids])
    log_p_SV = model(ids).logits()[0, :, 0].double().log_softmax(dim=-1)
    return sum(float(log_p_SV[t - 1, ids[0, t]]) for t in range(num_context, ids.shape[1]))


def test_lm_eval_finds_head_0s_log_likelihoods_without_knowing_this_program(
    model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    export = run_export_pipeline(str(model), tmp_path / "export").folder
    found = _run_lm_eval(export, tmp_path / "lm_eval")
    loaded = MTPModel.from_pretrained(export).eval()
    expected = [
        [_log_likelihood(loaded, row["context"], choice) for choice in row["choices"]] for row in _CHOICES
    ]
    assert max(max(row) - min(row) for row in expected) > 1
    samples = sorted(found["samples"], key=lambda sample: sample["doc_id"])
    for sample, row in zip(samples, expected, strict=True):
        values = [float(response[0]) for response in sample["filtered_resps"]]
        assert values == pytest.approx(row, abs=1e-3)
    right = [max(range(len(row)), key=row.__getitem__) for row in expected]
    accuracy = sum(best == row["answer"] for best, row in zip(right, _CHOICES, strict=True)) / len(_CHOICES)
    assert found["acc"] == pytest.approx(accuracy)
