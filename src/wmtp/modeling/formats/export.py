"""The export: a Hugging Face directory with two files more.

`mtp_heads.safetensors` holds head h (1..H-1) under `heads.{h}.`, `wmtp.json` says how many there are, of
which form, and at which offsets. Neither disturbs a plain loader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.modeling.formats.sources import HEADS_FILE, WMTP_FILE, ModelFiles, read_json
from wmtp.modeling.formats.tensors import tensor_shapes
from wmtp.modeling.heads import HEAD_FORMS, SavedHeads, check_offsets

if TYPE_CHECKING:
    from wmtp.modeling.mtp_model import MTPModel

FORMAT_VERSION = 1


def save_mtp_model(
    model: MTPModel,
    path: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    metadata: Mapping[str, Any] | None,
) -> None:
    """Write the export; see `MTPModel.save_pretrained`."""
    path.mkdir(parents=True, exist_ok=True)
    model.causal_lm.save_pretrained(path)
    tensors = {
        f"heads.{index}.{name}": tensor.detach().cpu().contiguous()
        for index, module in enumerate(model.extra_heads, start=1)
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, path / HEADS_FILE, metadata={"format": "pt"})
    description = {
        "format_version": FORMAT_VERSION,
        "horizon": model.horizon,
        "head": model.head_form,
        "offsets": list(model.offsets),
        "metadata": dict(metadata or {}),
    }
    (path / WMTP_FILE).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def read_saved_heads(files: ModelFiles) -> SavedHeads:
    """Return the heads that `wmtp.json` describes; one ordinary head where there is no such file.

    Raises:
        ModelLoadError: the description cannot be understood.
    """
    file = files.find(WMTP_FILE)
    if file is None:
        return SavedHeads()
    description = read_json(file)
    version, horizon, form, offsets = (
        description.get(key) for key in ("format_version", "horizon", "head", "offsets")
    )
    try:
        if version == FORMAT_VERSION and form in HEAD_FORMS and isinstance(offsets, list):
            checked = check_offsets(offsets)
            if horizon == len(checked):
                return SavedHeads(form, checked)
    except (UserInputError, TypeError):
        pass
    raise ModelLoadError(
        f"{file} describes heads this version cannot read: format_version={version!r}, horizon={horizon!r}, "
        f"head={form!r}, offsets={offsets!r}",
        remedy="use a newer version of wmtp, or export the model again",
    )


def saved_head_tensors(
    files: ModelFiles, saved: SavedHeads
) -> tuple[Callable[[int], dict[str, Tensor]], str]:
    """Return a function that reads the state dict of head h, and the file it reads.

    Raises:
        ModelLoadError: the checkpoint has learned heads by its description, and no file of them.
    """
    file = files.find(HEADS_FILE)
    if file is None and len(saved.offsets) > 1:
        raise ModelLoadError(
            f"{files} has {WMTP_FILE} but no {HEADS_FILE}",
            remedy="copy the whole export; the heads are missing",
        )

    def read(head: int) -> dict[str, Tensor]:
        assert file is not None
        prefix = f"heads.{head}."
        names = [name for name in tensor_shapes(file) if name.startswith(prefix)]
        with safe_open(file, framework="pt") as reader:
            return {name.removeprefix(prefix): reader.get_tensor(name) for name in names}

    return read, str(file)
