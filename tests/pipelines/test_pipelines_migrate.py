"""Configs of the older layout, its cache folder, and old `.pt` checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from s3_server import S3Server
from wmtp.components.loader.builtin import build_micro_llama
from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.meta_native_write import write_native
from wmtp.modeling.heads import HeadRequest
from wmtp.pipelines.environment import prepare_environment
from wmtp.pipelines.migrate_cache import inspect_cache, remove_cache
from wmtp.pipelines.migrate_checkpoint import convert_state_dict_file
from wmtp.pipelines.migrate_config import MigratedConfig, migrate_config
from wmtp.pipelines.migrate_state_dict import (
    is_state_dict_file,
    load_located_state_dict,
    load_state_dict_file,
)
from wmtp.pipelines.migrate_write import place_of, save_config
from wmtp.pipelines.outputs import RunOptions
from wmtp.settings import Config, load_config, load_settings
from wmtp.settings.config import PathSettings

LOCAL = """\
# Laptop

# Project metadata
project: "mtp_ft"
seed: 42

# Where things are kept
storage:
  mode: local
  local: {base_path: results}

paths:
  models:
    # the one that is trained
    base_local: models/7b_1t_4   # four heads
    rm_local: "models/Llama_3_8B_RM"
    ref_local: ${REF_MODEL:-org/ref}
  datasets:
    mbpp_local: dataset/mbpp
  cache: .cache

mlflow:
  experiment: mtp/wmtp
  tracking_uri: file:///tmp/mlflow
  registry_uri: file:///tmp/mlflow
launcher: {target: local, resources: {gpus: 1, cpus: 8}}
devices:
  compute_backend: cuda  # the big one
  mixed_precision: bf16
  fsdp: {enabled: yes, sharding: full}
"""
VESSL = """\
storage:
  mode: s3
  s3: {bucket: wmtp, prefix: "mtpfw/", endpoint_url: "http://store:9000"}
paths:
  models:
    base_s3: models/7b_1t_4
    base_local: /tmp/models/7b_1t_4
    ref: s3://other/ref
  datasets: {contest_s3: datasets/contest}
mlflow: {tracking_uri: "http://mlflow:5000", registry_uri: "http://registry:5000"}
launcher: {target: vessl, resources: {gpus: 4, gpu_type: A100, disk_gb: 500}}
devices: {compute_backend: auto, device_ids: [0, 1], mixed_precision: fp16, num_proc: 8}
"""
ADDRESSES = """\
s3_auth:
  default_bucket: wmtp
  access_key_id: AKIAEXAMPLE
  secret_access_key: "top/secret#1"
  profile: research
hf_auth: {token: hf_example}
paths:
  models: {base: "s3://wmtp/models/7b/", rm: file://./models/rm}
  checkpoints: {base_path: "file:///data/checkpoints", save_interval: 100, keep_last: 3}
mlflow: {tracking_uri: "http://me:hunter2@mlflow:5000"}
"""


def migrate(folder: Path, text: str) -> MigratedConfig:
    file = folder / "config.local.yaml"
    file.write_text(text, encoding="utf-8")
    return migrate_config(file)


def load(folder: Path, migrated: MigratedConfig) -> Config:
    file = folder / "new.yaml"
    file.write_text(migrated.text, encoding="utf-8")
    return load_config(file)


def kinds(migrated: MigratedConfig) -> dict[str, tuple[str, str]]:
    return {row.old: (row.kind, row.new) for row in migrated.keys}


# ------------------------------------------------------------------------------------------- configs


def test_a_local_config_says_the_same_in_the_present_layout(tmp_path: Path) -> None:
    migrated = migrate(tmp_path, LOCAL)
    config = load(tmp_path, migrated)
    assert config == migrated.settings
    assert config.paths.models.model_dump() == {
        "base": "models/7b_1t_4",
        "ref": "org/ref",
        "rm": "models/Llama_3_8B_RM",
    }
    assert config.paths.datasets.mbpp == "dataset/mbpp"
    assert config.paths.output == "results"
    assert config.mlflow.tracking_uri == "file:///tmp/mlflow"
    assert config.mlflow.registry_uri is None
    assert (config.devices.accelerator, config.devices.precision) == ("cuda", "bf16")
    assert config.devices.strategy == "auto"
    assert migrated.cache == ".cache"
    assert not migrated.is_current


def test_references_and_comments_go_along_and_what_has_no_successor_is_named(tmp_path: Path) -> None:
    text = migrate(tmp_path, LOCAL).text
    assert text.startswith("# Laptop\n# Made from config.local.yaml by `wmtp migrate`.\n")
    for line in (
        "    # the one that is trained\n    base: models/7b_1t_4  # four heads\n",
        "    ref: ${REF_MODEL:-org/ref}\n",
        '    rm: "models/Llama_3_8B_RM"\n',
        "  accelerator: cuda  # the big one\n",
        "#   seed: 42 -> belongs in the recipe: train.seed\n",
        "#   paths.cache: .cache -> there is no cache folder any more\n",
        "#   mlflow.experiment: mtp/wmtp -> experiments are named mtp/<algorithm>/<dataset>\n",
        "#   launcher.resources.cpus: 8 -> belongs in the job file of the cluster\n",
    ):
        assert line in text


def test_every_old_key_is_in_the_table_once_and_in_the_files_order(tmp_path: Path) -> None:
    migrated = migrate(tmp_path, LOCAL)
    found = kinds(migrated)
    assert len(found) == len(migrated.keys)
    assert [row.old for row in migrated.keys][:4] == [
        "project",
        "seed",
        "storage.mode",
        "storage.local.base_path",
    ]
    assert found["paths.models.base_local"] == ("moved", "paths.models.base")
    assert found["storage.local.base_path"] == ("moved", "paths.output")
    assert found["seed"] == ("dropped", "")
    assert found["launcher.target"] == ("kept", "launcher.target")
    assert found["devices.fsdp.enabled"] == ("changed", "devices.strategy")


def test_keys_of_a_bucket_become_addresses_with_the_prefix(tmp_path: Path) -> None:
    migrated = migrate(tmp_path, VESSL)
    text = migrated.text
    assert 'base: "s3://wmtp/mtpfw/models/7b_1t_4"' in text
    assert 'contest: "s3://wmtp/mtpfw/datasets/contest"' in text
    assert "ref: s3://other/ref" in text
    config = load(tmp_path, migrated)
    assert config.s3.bucket == "wmtp"
    assert config.s3.endpoint_url == "http://store:9000"
    # Not given, which meant another region than the present default.
    assert config.s3.region == "ap-northeast-2"
    assert config.devices.precision == "auto"
    assert config.mlflow.registry_uri == "http://registry:5000"
    assert kinds(migrated)["storage.s3.prefix"] == ("changed", "paths.output")
    assert 'output: "s3://wmtp/mtpfw"' in text
    assert kinds(migrated)["paths.models.base_local"] == ("dropped", "")


def test_a_mode_of_local_prefers_the_local_place(tmp_path: Path) -> None:
    migrated = migrate(tmp_path, VESSL.replace("mode: s3", "mode: local"))
    assert "base: /tmp/models/7b_1t_4" in migrated.text
    assert kinds(migrated)["paths.models.base_s3"] == ("dropped", "")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_mode_of_auto_goes_by_what_is_on_this_machine(is_there: bool, tmp_path: Path) -> None:
    local = tmp_path / "model"
    if is_there:
        local.mkdir()
    text = VESSL.replace("mode: s3", "mode: auto").replace("/tmp/models/7b_1t_4", str(local))
    expected = f"base: {local}" if is_there else 'base: "s3://wmtp/mtpfw/models/7b_1t_4"'
    assert expected in migrate(tmp_path, text).text


def test_what_this_version_cannot_do_is_written_as_a_comment_with_the_reason(tmp_path: Path) -> None:
    migrated = migrate(tmp_path, VESSL.replace("http://store:9000", "store:9000"))
    config = load(tmp_path, migrated)
    assert config.s3.endpoint_url is None
    assert '  # endpoint_url: "store:9000"   # must match ^https?://.+' in migrated.text
    assert kinds(migrated)["storage.s3.endpoint_url"] == ("disabled", "s3.endpoint_url")


def test_secrets_in_clear_text_become_references_and_are_nowhere_shown(tmp_path: Path) -> None:
    migrated = migrate(tmp_path, ADDRESSES)
    shown = migrated.text + repr(migrated.keys) + repr(migrated.warnings)
    for secret in ("AKIAEXAMPLE", "top/secret#1", "hf_example", "hunter2"):
        assert secret not in shown
    assert "access_key_id: ${AWS_ACCESS_KEY_ID}\n" in migrated.text
    assert "secret_access_key: ${AWS_SECRET_ACCESS_KEY}\n" in migrated.text
    assert "http://me:${MLFLOW_PASSWORD}@mlflow:5000" in migrated.text
    lines = " ".join(migrated.warnings)
    for text in ("s3_auth.access_key_id", "config.local.yaml:3", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        assert text in lines
    assert set(migrated.unset) == {"s3.access_key_id", "s3.secret_access_key", "mlflow.tracking_uri"}
    assert migrated.settings.s3.bucket == "wmtp"


def test_secrets_that_are_references_already_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ADDRESSES.replace("AKIAEXAMPLE", "${MY_KEY}").replace('"top/secret#1"', "${MY_SECRET}")
    text = text.replace("hunter2", "${MY_PASSWORD}").replace("hf_example", "${HF_TOKEN}")
    for name in ("MY_KEY", "MY_SECRET", "MY_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, "value")
    text = text.replace("{token: ${HF_TOKEN}}", '{token: "${HF_TOKEN}"}')
    migrated = migrate(tmp_path, text)
    assert migrated.warnings == ()
    assert "access_key_id: ${MY_KEY}\n" in migrated.text
    assert load(tmp_path, migrated).mlflow.tracking_uri == "http://me:value@mlflow:5000"


@pytest.mark.parametrize("name", ["config.example.yaml", "config.s3.yaml"])
def test_a_present_config_needs_nothing(name: str) -> None:
    assert migrate_config(Path(__file__).parents[2] / "configs" / name).is_current


def test_a_key_that_no_layout_had_is_named_and_left_out(tmp_path: Path) -> None:
    migrated = migrate(tmp_path, "storage: {mode: local}\npaths: {colour: blue}\n")
    assert any("paths.colour is not known to any layout" in warning for warning in migrated.warnings)
    assert load(tmp_path, migrated) == Config()


def test_a_present_config_with_one_store_for_runs_and_models_needs_nothing(tmp_path: Path) -> None:
    text = "mlflow: {tracking_uri: mlruns, registry_uri: mlruns}\npaths: {output: null}\n"
    assert migrate(tmp_path, text).is_current


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "does not exist"),
        (b"- a\n- b\n", "holds no sections at its top"),
        (b"", "holds no sections at its top"),
        (b"paths:\n  models: {base: ${HOME}}\n", "config.local.yaml:2 is not valid YAML"),
        (b"secret: [hunter2", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"#" * (2**20 + 1), "larger than 1 MiB"),
        (b"train: {algo: baseline-mtp}\ndata: {}\n", "is a recipe"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_the_reason(
    content: bytes | None, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.local.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserInputError, match=expected) as caught:
        migrate_config(file)
    assert "hunter2" not in str(caught.value)
    assert caught.value.remedy


def test_a_new_file_replaces_nothing_without_force_and_keeps_a_copy_with_it(tmp_path: Path) -> None:
    migrated = migrate(tmp_path, LOCAL)
    source = migrated.source
    source.chmod(0o600)
    place = place_of(source, None, force=False)
    assert place == tmp_path / "config.local.new.yaml"
    assert save_config(migrated.text, place, source=source).backup is None
    assert place.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserInputError, match="exists already, and nothing was written"):
        place_of(source, None, force=False)
    place.write_text("mine")
    saved = save_config(migrated.text, place_of(source, None, force=True), source=source)
    assert saved.backup is not None
    assert saved.backup.read_text() == "mine"
    # In place of the old file itself.
    saved = save_config(migrated.text, place_of(source, source, force=True), source=source)
    assert saved.backup is not None
    assert saved.backup.read_text() == LOCAL
    assert source.read_text() == migrated.text


# ------------------------------------------------------------------------------------------- cache folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "project" / ".cache"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "model.safetensors").write_bytes(bytes(1000))
    (folder / "models" / "config.json").write_text("{}")
    (folder / "tokens.arrow").write_bytes(bytes(50))
    (folder / "models" / "again.safetensors").symlink_to(folder / "models" / "model.safetensors")
    return folder


def test_a_cache_is_described_and_removed_whole(cache: Path) -> None:
    found = inspect_cache(cache, is_configured=True)
    assert found.path == cache
    assert found.num_files == 4
    assert found.kinds["weights"] == (1, 1000)
    assert found.kinds["data"] == (1, 50)
    assert cache.is_dir()
    remove_cache(found)
    assert list(cache.parent.iterdir()) == []


def config_at(**paths: Any) -> Config:
    return Config(paths=PathSettings(**paths))


@pytest.mark.parametrize("place", ["base", "output", "work", "inside", "above"])
def test_what_is_configured_is_never_removed(place: str, cache: Path) -> None:
    configs = {
        "base": config_at(models={"base": str(cache)}),
        "output": config_at(output=str(cache)),
        "work": config_at(work=str(cache)),
        "inside": config_at(datasets={"mbpp": str(cache / "models")}),
        "above": config_at(output=str(cache.parent)),
    }
    with pytest.raises(UserInputError, match="which is in use"):
        inspect_cache(cache, is_configured=True, configs=[configs[place]])
    assert (cache / "models" / "model.safetensors").exists()


def test_places_of_the_system_and_of_the_user_are_never_removed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(cache.parent)
    for folder, why in (
        (Path("/"), "is in it"),
        (Path("/tmp"), "in it|of the system"),
        (Path("/etc"), "of the system"),
        (home, "your home folder"),
        (tmp_path, "is in it"),
        (cache.parent, "the working folder"),
        (home / ".cache", "other programs use it too"),
        (Path("/proc"), "of the system"),
    ):
        with pytest.raises(UserInputError, match=f"is not removed: .*{why}"):
            inspect_cache(folder, is_configured=True)
    with pytest.raises(UserInputError, match="neither its name nor a config"):
        inspect_cache(cache / "models", is_configured=False)


def test_a_link_to_a_cache_and_a_cache_with_links_out_of_it_stay(cache: Path, tmp_path: Path) -> None:
    link = tmp_path / "cache-link"
    link.symlink_to(cache)
    with pytest.raises(UserInputError, match="it is a link to"):
        inspect_cache(link, is_configured=True)
    outside = tmp_path / "mine"
    outside.mkdir()
    (cache / "models" / "out").symlink_to(outside)
    with pytest.raises(UserInputError, match=r"links lead out of it: models/out"):
        inspect_cache(cache, is_configured=True)


@pytest.mark.parametrize(
    "name", [".git/HEAD", "notes.ipynb", "train.py", "mlflow.db", "run/step-10/manifest.json"]
)
def test_work_of_people_and_of_runs_is_never_removed(name: str, cache: Path) -> None:
    file = cache / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("work")
    with pytest.raises(UserInputError, match="holds what no cache had"):
        inspect_cache(cache, is_configured=True)


def test_code_of_cached_models_is_part_of_a_cache(cache: Path) -> None:
    file = cache / "models--org--name" / "snapshots" / "0a" / "modeling.py"
    file.parent.mkdir(parents=True)
    file.write_text("code")
    assert inspect_cache(cache, is_configured=True).num_files == 5


def test_a_folder_that_is_not_there_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="there is no folder"):
        inspect_cache(tmp_path / "cache", is_configured=True)
    (tmp_path / "cache").write_text("file")
    with pytest.raises(UserInputError, match="it is a file"):
        inspect_cache(tmp_path / "cache", is_configured=True)


# ------------------------------------------------------------------------------------------- checkpoints


def tiny(seed: int = 0, *, is_tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=is_tied,
        )
    )


def with_heads(form: Any, *, horizon: int = 3) -> MTPModel:
    model = MTPModel.from_causal_lm(tiny(seed=1), horizon=horizon, head=form)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny().save_pretrained(folder)
    return str(folder)


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def renamed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("form", ["transformer", "linear", "medusa", "sequential"])
def test_a_state_dict_with_heads_comes_back_bit_for_bit(form: str, base: str, tmp_path: Path) -> None:
    model = with_heads(form)
    torch.save(model.state_dict(), tmp_path / "old.pt")
    loaded = load_state_dict_file(str(tmp_path / "old.pt"), base, Config())
    assert (loaded.head_form, loaded.offsets) == (form, (1, 2, 3))
    assert same(model, loaded)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "base_model.", "_fsdp_wrapped_module.model."]
)
def test_marks_of_wrappers_are_taken_off(prefix: str, base: str, tmp_path: Path) -> None:
    plain = tiny(seed=2)
    torch.save(renamed(plain.state_dict(), prefix), tmp_path / "old.pt")
    assert same(load_state_dict_file(str(tmp_path / "old.pt"), base, Config()).causal_lm, plain)
    model = with_heads("transformer")
    inside = {
        name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): tensor
        for name, tensor in model.state_dict().items()
    }
    torch.save(renamed(inside, prefix), tmp_path / "heads.pt")
    assert same(load_state_dict_file(str(tmp_path / "heads.pt"), base, Config()), model)


def test_the_old_programs_checkpoint_becomes_a_model_folder(base: str, tmp_path: Path) -> None:
    model = with_heads("transformer")
    old = {"model": model.state_dict(), "optimizer": {"state": {}}, "epoch": 1, "step": 10, "algorithm": "x"}
    torch.save(old, tmp_path / "checkpoint_step_10.pt")
    folder = tmp_path / "out"
    done = convert_state_dict_file(str(tmp_path / "checkpoint_step_10.pt"), base, folder)
    assert done.left_out == ("optimizer", "epoch", "step", "algorithm")
    assert (done.horizon, done.head, done.dtype) == (3, "transformer", "float32")
    assert "tokenizer" in done.notes[0]
    assert same(MTPModel.from_pretrained(folder), model)
    assert same(AutoModelForCausalLM.from_pretrained(folder), model.causal_lm)
    with pytest.raises(UserInputError, match="exists already and is not empty"):
        convert_state_dict_file(str(tmp_path / "checkpoint_step_10.pt"), base, folder)
    again = convert_state_dict_file(str(tmp_path / "checkpoint_step_10.pt"), base, folder, force=True)
    assert again.folder == folder
    written = "".join(file.read_text(errors="ignore") for file in folder.glob("*.json"))
    assert str(tmp_path) not in written


def test_the_tokenizer_of_the_base_goes_along(tmp_path: Path) -> None:
    torch.save(build_micro_llama(seed=5).half().state_dict(), tmp_path / "old.pt")
    done = convert_state_dict_file(str(tmp_path / "old.pt"), "builtin:micro-llama", tmp_path / "out")
    assert (done.notes, done.dtype) == ((), "float16")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_dry_run_reads_everything_and_writes_nothing(base: str, tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "old.pt")
    done = convert_state_dict_file(str(tmp_path / "old.pt"), base, tmp_path / "out", dry_run=True)
    assert done.num_parameters == tiny().num_parameters()
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_may_stand_in_the_file_once_or_twice(tmp_path: Path) -> None:
    model = tiny(seed=3, is_tied=True)
    model.save_pretrained(tmp_path / "base")
    tensors = model.state_dict()
    torch.save(tensors, tmp_path / "twice.pt")
    torch.save(
        {name: value for name, value in tensors.items() if name != "lm_head.weight"}, tmp_path / "once.pt"
    )
    for name in ("twice.pt", "once.pt"):
        loaded = load_state_dict_file(str(tmp_path / name), str(tmp_path / "base"), Config())
        assert same(loaded.causal_lm, model)


def test_buffers_that_older_versions_saved_are_passed_over(base: str, tmp_path: Path) -> None:
    model = tiny()
    old = {**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(old, tmp_path / "old.pt")
    assert same(load_state_dict_file(str(tmp_path / "old.pt"), base, Config()).causal_lm, model)


def test_metas_names_are_read_with_a_native_base(tmp_path: Path) -> None:
    model = with_heads("transformer")
    write_native(model, tmp_path / "native", dtype=torch.float32)
    tensors = torch.load(tmp_path / "native" / "consolidated.pth", weights_only=True)
    torch.save({"model": renamed(tensors, "module.")}, tmp_path / "old.pt")
    loaded = load_state_dict_file(str(tmp_path / "old.pt"), str(tmp_path / "native"), Config())
    assert same(loaded, model)


def test_fewer_and_more_heads_than_the_file_has_can_be_asked_for(base: str, tmp_path: Path) -> None:
    torch.save(with_heads("linear").state_dict(), tmp_path / "old.pt")
    file = str(tmp_path / "old.pt")
    with pytest.warns(UserWarning, match="has 3 heads; the first 2 are used"):
        assert load_state_dict_file(file, base, Config(), request=HeadRequest(horizon=2)).horizon == 2
    assert load_state_dict_file(file, base, Config(), request=HeadRequest(horizon=4)).horizon == 4


def test_an_evaluation_takes_base_tokenizer_and_horizon_from_the_settings(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "configs"
    config, recipe = load_settings(
        folder / "config.local_test.yaml", folder / "recipe.mtp_baseline.yaml", ["model.mtp.horizon=2"]
    )
    model = MTPModel.from_causal_lm(build_micro_llama(seed=6), horizon=3, head="linear").half()
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "old.pt")
    environment = prepare_environment(config, recipe)
    with pytest.warns(UserWarning, match="the first 2 are used"):
        loaded, tokenizer = load_located_state_dict(
            config, recipe, environment, str(tmp_path / "old.pt"), RunOptions()
        )
    assert (loaded.horizon, loaded.head_form, loaded.dtype) == (2, "linear", torch.float32)
    assert torch.equal(loaded.unembedding_VD, model.unembedding_VD.float())
    assert len(tokenizer.tokenizer) == loaded.unembedding_VD.shape[0]


@pytest.mark.s3
def test_a_state_dict_is_read_from_s3(base: str, s3_server: S3Server, tmp_path: Path) -> None:
    torch.save(tiny(seed=4).state_dict(), tmp_path / "old.pt")
    address = f"s3://{s3_server.bucket}/migrate/old.pt"
    s3_server.filesystem().put_file(str(tmp_path / "old.pt"), address.removeprefix("s3://"))
    config = Config(s3=s3_server.settings)
    assert is_state_dict_file(address)
    assert same(load_state_dict_file(address, base, config).causal_lm, tiny(seed=4))


def _damage(tensors: dict[str, Any], how: str) -> Any:
    name = "model.layers.1.mlp.up_proj.weight"
    match how:
        case "missing":
            del tensors[name]
        case "misshapen":
            tensors[name] = torch.zeros(3, 5)
        case "unexpected":
            tensors["value_head.weight"] = torch.zeros(1, 32)
        case "twice":
            tensors[f"module.{name}"] = tensors[name]
        case "two models":
            tensors.update(renamed(dict(tensors), "reference."))
        case "head gap":
            tensors["extra_heads.1.map.weight"] = torch.zeros(32, 32)
        case "strange head":
            tensors["extra_heads.0.strange"] = torch.zeros(32, 32)
        case "no embedding":
            return {"a": torch.zeros(1), "b": torch.zeros(1)}
        case "no tensors":
            return {"epoch": 3, "args": [1]}
        case "list":
            return [1, 2]
        case "not a tensor":
            tensors["epoch"] = 3
    return tensors


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("missing", "lacks the tensor 'model.layers.1.mlp.up_proj.weight'"),
        ("misshapen", r"'model.layers.1.mlp.up_proj.weight' has shape \[3, 5\], the model needs \[48, 32\]"),
        ("unexpected", "has the tensor 'value_head.weight', which a model like"),
        ("twice", "two tensors that both mean 'model.layers.1.mlp.up_proj.weight'"),
        ("two models", "holds 2 models: model.embed_tokens.weight, reference.model.embed_tokens.weight"),
        ("head gap", "heads extra_heads.1, which are not numbered from 0"),
        ("strange head", "heads with the tensors strange are of no form"),
        ("no embedding", "has no tensor 'model.embed_tokens.weight'.* it has a, b"),
        ("no tensors", "holds no state dict: its entries are epoch, args"),
        ("list", "holds list, not tensors by name"),
        ("not a tensor", "the entry 'epoch' is int, not a tensor"),
    ],
)
def test_what_does_not_fit_is_named(how: str, expected: str, base: str, tmp_path: Path) -> None:
    torch.save(_damage(tiny().state_dict(), how), tmp_path / "old.pt")
    with pytest.raises(ModelLoadError, match=expected) as caught:
        convert_state_dict_file(str(tmp_path / "old.pt"), base, tmp_path / "out")
    assert str(tmp_path / "old.pt") in caught.value.message
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


class _Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.file),)


def test_a_pickle_with_code_is_refused_by_name_and_nothing_of_it_runs(base: str, tmp_path: Path) -> None:
    torch.save({"model": tiny().state_dict(), "config": _Hostile(tmp_path / "ran")}, tmp_path / "old.pt")
    with pytest.raises(ModelLoadError, match=r"asks for \w+\.mkdir, which is code") as caught:
        load_state_dict_file(str(tmp_path / "old.pt"), base, Config())
    assert not (tmp_path / "ran").exists()
    assert "state_dict()" in str(caught.value.remedy)


def test_only_torch_files_are_taken_for_state_dicts(base: str, tmp_path: Path) -> None:
    assert not is_state_dict_file(base)
    assert not is_state_dict_file(str(tmp_path / "absent.pt"))
    (tmp_path / "there.pt").touch()
    assert is_state_dict_file(str(tmp_path / "there.pt"))
    with pytest.raises(ModelLoadError, match="is not a file"):
        load_state_dict_file(str(tmp_path / "absent.pt"), base, Config())
