"""Path resolution: local, object stores, hub ids, names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp.storage import BUILTIN_DATASETS, BUILTIN_MODELS, PathResolver

resolve = PathResolver().resolve


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("runs") == ("local", str(tmp_path / "runs"))
    assert resolve("./a/../b/model") == ("local", str(tmp_path / "b/model"))
    assert resolve(Path("/data//x/")) == ("local", "/data/x")
    assert resolve(f"file://{tmp_path}/x") == ("local", str(tmp_path / "x"))


def test_home_is_expanded() -> None:
    assert resolve("~/models/x/y") == ("local", os.path.expanduser("~/models/x/y"))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("s3://bucket/key", "s3"),
        ("S3://bucket/key", "s3"),
        ("gs://bucket/key/model", "gs"),
        ("facebook/multi-token-prediction", "hub"),
        ("facebook/multi-token-prediction:7B_1T_4", "hub"),
        ("builtin:micro-base", "builtin"),
        ("models:/wmtp_critic_value_head/3", "models"),
        ("runs:/0123abcd", "runs"),
        ("data/train.jsonl", "local"),
        ("a/b/c", "local"),
        ("../org/name", "local"),
        ("gpt2", "local"),
    ],
)
def test_kinds_are_told_by_form(
    path: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, resolved = resolve(path)
    assert found == kind
    assert resolved == (str((tmp_path / path).resolve()) if kind == "local" else path)


def test_an_existing_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name")[0] == "hub"
    (tmp_path / "org/name").mkdir(parents=True)
    assert resolve("org/name") == ("local", str(tmp_path / "org/name"))


@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="empty path"):
        resolve(path)


@given(st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text))
def test_resolving_twice_changes_nothing(path: str) -> None:
    kind, resolved = resolve(path)
    assert resolve(resolved) == (kind, resolved)


def test_models_and_datasets_are_told_by_content(tmp_path: Path) -> None:
    resolver = PathResolver()
    model, data, empty = tmp_path / "model", tmp_path / "data", tmp_path / "empty"
    for folder in (model, data, empty):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    (data / "train.jsonl.gz").write_bytes(b"")
    assert resolver.is_model_path(model)
    assert not resolver.is_dataset_path(model)
    assert resolver.is_dataset_path(data)
    assert resolver.is_dataset_path(data / "train.jsonl.gz")
    assert not resolver.is_model_path(data)
    for path in (empty, tmp_path / "absent"):
        assert not resolver.is_model_path(path)
        assert not resolver.is_dataset_path(path)


def test_models_and_datasets_elsewhere_are_told_by_form() -> None:
    resolver = PathResolver()
    assert resolver.is_model_path("s3://b/llama")
    assert resolver.is_dataset_path("s3://b/llama")
    assert resolver.is_dataset_path("s3://b/mbpp.jsonl")
    assert not resolver.is_model_path("s3://b/mbpp.jsonl")
    assert resolver.is_model_path("s3://b/state.pt")
    assert not resolver.is_dataset_path("s3://b/state.pt")
    assert all(resolver.is_model_path(name) and not resolver.is_dataset_path(name) for name in BUILTIN_MODELS)
    assert all(
        resolver.is_dataset_path(name) and not resolver.is_model_path(name) for name in BUILTIN_DATASETS
    )
    assert not resolver.is_dataset_path("runs:/0123")
