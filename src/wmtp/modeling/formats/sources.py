"""Where the files of a model are, and whether they can be read without running anything that came with
them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.formats.tensors import tensor_shapes

CONFIG_FILE = "config.json"
HEADS_FILE = "mtp_heads.safetensors"
WMTP_FILE = "wmtp.json"
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<subfolder>[\w./-]+))?")
# Index files first: a folder that has one is sharded.
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
# Configuration keys that make transformers import code, or fetch compiled kernels, chosen by whoever wrote
# the file; with the values that stay inside PyTorch.
_CODE_KEYS: dict[str, tuple[Any, ...]] = {
    "auto_map": (None, {}),
    "custom_pipelines": (None, {}),
    "quantization_config": (None, {}),
    "attn_implementation": (None, "eager", "sdpa", "flex_attention"),
    "_attn_implementation": (None, "eager", "sdpa", "flex_attention"),
    "experts_implementation": (None, "eager", "batched_mm", "grouped_mm"),
    "_experts_implementation": (None, "eager", "batched_mm", "grouped_mm"),
}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model directory, or a repository of the hub with an optional subfolder."""

    source: str
    subfolder: str = ""

    @property
    def directory(self) -> Path | None:
        """The local directory; None for the hub."""
        return Path(self.source) if Path(self.source).is_dir() else None

    def find(self, name: str) -> Path | None:
        """Return the path of a file, downloaded if it is on the hub, or None if there is none.

        Raises:
            ModelLoadError: the hub does not answer, or refuses.
        """
        try:
            found = cached_file(
                self.source,
                name,
                subfolder=self.subfolder,
                _raise_exceptions_for_missing_entries=False,
            )
        except OSError as error:
            raise ModelLoadError(
                f"cannot read {name} of {self}: {error}",
                remedy="check the spelling (a path, or org/name on the hub), the network, and HF_TOKEN for a "
                "model behind a licence",
            ) from error
        return None if found is None else Path(found)

    def __str__(self) -> str:
        return f"{self.source}:{self.subfolder}" if self.subfolder else self.source


def locate_model(path: str | Path) -> ModelFiles:
    """Tell a directory from a hub id.

    Raises:
        ModelLoadError: it is neither, or the directory has no config.json.
    """
    text = str(path)
    local = Path(text).expanduser()
    if local.is_file():
        raise ModelLoadError(f"{text} is a file, not a model directory", remedy="give its directory")
    if local.is_dir():
        if not (local / CONFIG_FILE).is_file():
            names = ", ".join(sorted(entry.name for entry in local.iterdir())[:8]) or "nothing"
            raise ModelLoadError(
                f"{local} has no {CONFIG_FILE} (it holds: {names})",
                remedy="give a directory written by save_pretrained, or a hub id",
            )
        return ModelFiles(str(local))
    match = None if isinstance(path, Path) else _HUB_ID.fullmatch(text)
    if match is None:
        raise ModelLoadError(
            f"model directory {text} does not exist",
            remedy="give an existing directory, or a hub id such as org/name or org/name:subfolder",
        )
    return ModelFiles(match["repo"], match["subfolder"] or "")


def read_safe_config(files: ModelFiles) -> dict[str, Any]:
    """Read config.json and refuse one that would make the loader run or fetch code.

    Raises:
        ModelLoadError: the file is missing, is not JSON, or has such a key; the message names the key.
    """
    if files.find(CONFIG_FILE) is None:
        raise ModelLoadError(
            f"{files} is not a directory here, and no {CONFIG_FILE} was found on the hub under this name",
            remedy="check the path or the id (org/name), and that the network is on",
        )
    try:
        config, _ = PreTrainedConfig.get_config_dict(files.source, subfolder=files.subfolder)
    except OSError as error:
        message = f"{CONFIG_FILE} of {files} cannot be read: {error}"
        raise ModelLoadError(message, remedy="fetch it again") from error
    for key, value in _walk(config):
        if key in _CODE_KEYS and value not in _CODE_KEYS[key]:
            raise ModelLoadError(
                f"{CONFIG_FILE} of {files} has {key!r}: {value!r}, which can make the loader run code that "
                "is not part of this program",
                remedy="use a model without it; or read that code, then pass trust_remote_code=True "
                "(--trust-remote-code)",
            )
    if files.find("adapter_config.json") is not None:
        raise ModelLoadError(
            f"{files} holds an adapter (adapter_config.json), whose base model would come from elsewhere",
            remedy="merge the adapter into its base model and save that",
        )
    return dict(config)


def check_weight_files(files: ModelFiles) -> None:
    """Check that the weights are there and their safetensors headers readable; hub repositories are left to
    the hub.

    Raises:
        ModelLoadError: with the name of the file.
    """
    directory = files.directory
    if directory is None:
        return
    weights = list(_weight_files(directory))
    for file in weights:
        if not file.is_file():
            raise ModelLoadError(f"{file} is missing", remedy="copy the whole model directory again")
        if file.suffix == ".safetensors":
            tensor_shapes(file)
    if not weights:
        raise ModelLoadError(
            f"{directory} has no weights ({', '.join(_SINGLE_FILES)}, or an index of shards)",
            remedy="copy the whole model directory again",
        )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelLoadError: with the name of the file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error}", remedy="fetch or save it again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file} must hold a JSON object, it holds {type(value).__name__}")
    return value


def _weight_files(directory: Path) -> Iterator[Path]:
    for single, index in zip(_SINGLE_FILES, _INDEX_FILES, strict=True):
        if (directory / single).is_file():
            yield directory / single
            return
        if (directory / index).is_file():
            weight_map = read_json(directory / index).get("weight_map", {})
            for name in sorted(set(weight_map.values())):
                # A shard index is data from outside: an entry such as ../../x must not leave the folder.
                if Path(name).name != name:
                    raise ModelLoadError(
                        f"{directory / index} names the shard {name!r}, which is not a plain file name",
                        remedy="do not use this model; its index points outside its folder",
                    )
                yield directory / name
            return


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key and value of nested mappings and lists: a text model may stand inside a larger one."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item)
