"""Where a path points: this machine, an object store, the hub, or something this package brings along."""

from __future__ import annotations

import os
import re
from pathlib import Path

BUILTIN_MODELS = ("builtin:micro-llama", "builtin:micro-base", "builtin:micro-reference")
BUILTIN_DATASETS = ("builtin:microcode", "builtin:humaneval")

_SCHEME = re.compile(r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
# Schemes that name a thing without an authority part: what this package brings along, and MLflow's two.
_NAMED = re.compile(r"^(?P<scheme>builtin|models|runs):(?P<name>.+)$")
_HUB_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HUB_ID = re.compile(rf"^{_HUB_PART}/{_HUB_PART}(:[A-Za-z0-9][A-Za-z0-9._/-]*)?$")

_MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_MODEL_FILES = ("config.json", "params.json", "wmtp.json")
_DATASET_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")


class PathResolver:
    """Tells where a path points, without touching the network.

    A path is a local file or folder, `scheme://...`, a hub id (`org/name` or `org/name:subfolder`),
    `builtin:<name>`, or an MLflow name (`models:/...`, `runs:/...`). What exists on this machine wins over
    the hub, so that a folder called `org/name` is used where it stands.
    """

    def resolve(self, path: str | os.PathLike[str]) -> tuple[str, str]:
        """Return `(kind, resolved)`; resolving `resolved` again gives the same pair.

        `kind` is "local", "hub", "builtin", "models", "runs" or the scheme ("s3", "gs", ...). `resolved` is
        absolute for local paths (`~` and `file://` are understood) and the given text for all others.

        Raises:
            ValueError: the path is empty.
        """
        text = os.fspath(path).strip()
        if not text:
            raise ValueError("an empty path cannot be resolved; give a folder, an s3:// address or a hub id")
        scheme = _SCHEME.match(text)
        if scheme is not None:
            name = scheme["scheme"].lower()
            return ("local", _absolute(text[scheme.end() :])) if name == "file" else (name, text)
        named = _NAMED.match(text)
        if named is not None:
            return named["scheme"], text
        if self._looks_like_hub_id(text) and not os.path.exists(text):
            return "hub", text
        return "local", _absolute(text)

    def is_model_path(self, path: str | os.PathLike[str]) -> bool:
        """Whether the path can be a model: by what lies there when it is local, by its form elsewhere."""
        kind, resolved = self.resolve(path)
        if kind == "builtin":
            return resolved in BUILTIN_MODELS
        if kind != "local":
            return not _has_suffix(resolved, _DATASET_SUFFIXES)
        local = Path(resolved)
        if local.is_dir():
            return any(
                entry.name in _MODEL_FILES or _has_suffix(entry.name, _MODEL_SUFFIXES)
                for entry in local.iterdir()
            )
        return local.is_file() and _has_suffix(local.name, _MODEL_SUFFIXES)

    def is_dataset_path(self, path: str | os.PathLike[str]) -> bool:
        """Whether the path can be a dataset: by what lies there when it is local, by its form elsewhere.

        A bare hub id or bucket folder can be either, so both questions are answered with yes.
        """
        kind, resolved = self.resolve(path)
        if kind == "builtin":
            return resolved in BUILTIN_DATASETS
        if kind in ("models", "runs"):
            return False
        if kind != "local":
            return not _has_suffix(resolved, _MODEL_SUFFIXES)
        local = Path(resolved)
        if local.is_dir():
            return not self.is_model_path(resolved) and any(
                _has_suffix(entry.name, _DATASET_SUFFIXES) for entry in local.iterdir()
            )
        return local.is_file() and _has_suffix(local.name, _DATASET_SUFFIXES)

    def _looks_like_hub_id(self, text: str) -> bool:
        # `data/train.jsonl` has the form of a hub id, but a file's ending says that a file is meant.
        return _HUB_ID.match(text) is not None and not _has_suffix(text, _MODEL_SUFFIXES + _DATASET_SUFFIXES)


def _absolute(text: str) -> str:
    return os.path.abspath(os.path.expanduser(text))


def _has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes)
