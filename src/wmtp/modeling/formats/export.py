"""The export: a Hugging Face directory with two files more.

`mtp_heads.safetensors` holds head h (1..H-1) under `heads.{h}.`, `wmtp.json` says how many there are, of
which form, and at which offsets. Neither disturbs a plain loader.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.modeling.formats.sources import HEADS_FILE, WMTP_FILE, ModelSource, read_source_json
from wmtp.modeling.formats.tensors import disk_errors_of_safetensors, open_tensors
from wmtp.modeling.heads import HEAD_FORMS, SavedHeads, check_offsets
from wmtp.modeling.lora import plain_state_dict
from wmtp.modeling.state_dict import floating_tensors, set_precision

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
    """Write the export; see `MTPModel.save_pretrained`.

    Raises:
        OSError: the disk is full or cannot be written to.
    """
    path.mkdir(parents=True, exist_ok=True)
    causal_lm = model.causal_lm
    own_generation_config = causal_lm.generation_config
    causal_lm.generation_config = complete_generation_config(causal_lm, tokenizer)
    state = None if model.lora is None else plain_state_dict(model)
    try:
        with disk_errors_of_safetensors(path):
            causal_lm.save_pretrained(path, state_dict=state)
    finally:
        causal_lm.generation_config = own_generation_config
    tensors = {
        f"heads.{index}.{name}": tensor.detach().cpu().contiguous()
        for index, module in enumerate(model.extra_heads, start=1)
        for name, tensor in module.state_dict().items()
    }
    with disk_errors_of_safetensors(path / HEADS_FILE):
        save_file(tensors, path / HEADS_FILE, metadata={"format": "pt"})
    description = {
        "format_version": FORMAT_VERSION,
        "horizon": model.horizon,
        "head": model.head_form,
        "offsets": list(model.offsets),
        "metadata": dict(metadata or {}),
    }
    (path / WMTP_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def complete_generation_config(
    causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> GenerationConfig:
    """Return the model's generation config with the ids that `generate()` needs to begin, stop and pad.

    The model's own ids stay. The tokenizer's end-of-sequence token, which ends every training document, is
    one more place to stop; beginning and padding come from the tokenizer where the model has none, and what
    has no padding token is padded with the end-of-sequence token. Ids outside the vocabulary are left out.
    """
    own = causal_lm.generation_config
    config = GenerationConfig() if own is None else copy.deepcopy(own)
    embedding: Any = causal_lm.get_input_embeddings()
    vocab_size: int = embedding.weight.shape[0]

    def known(*candidates: int | list[int] | None) -> list[int]:
        listed = [ids if isinstance(ids, list) else [ids] for ids in candidates]
        flat = [token_id for ids in listed for token_id in ids if token_id is not None]
        return [token_id for token_id in dict.fromkeys(flat) if 0 <= token_id < vocab_size]

    eos, bos, pad = (
        (None, None, None)
        if tokenizer is None
        else (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    )
    stops = known(config.eos_token_id, eos)
    config.eos_token_id = stops if len(stops) > 1 else next(iter(stops), None)
    config.bos_token_id = next(iter(known(config.bos_token_id, bos)), None)
    config.pad_token_id = next(iter(known(config.pad_token_id, pad, stops)), None)
    return _made_valid(config)


def _made_valid(config: GenerationConfig) -> GenerationConfig:
    """Return a config that transformers agrees to save; it refuses what contradicts itself."""
    try:
        config.validate(strict=True)
    except ValueError:
        # The usual contradiction: sampling parameters, as in older models, with sampling left off.
        config.do_sample = True
    try:
        config.validate(strict=True)
    except ValueError as error:
        warnings.warn(
            f"only the special tokens of the generation config are exported, the rest is invalid: {error}",
            stacklevel=2,
        )
        ids = {name: getattr(config, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
        return GenerationConfig(**ids)  # type: ignore[no-untyped-call]
    return config


def convert_dtype(model: MTPModel, dtype: torch.dtype) -> None:
    """Convert a model in place to the precision it is to be written in, see `set_precision`.

    Raises:
        ModelLoadError: a tensor has values that are not finite in this precision; the message names it.
    """
    set_precision(model, dtype)
    for name, tensor in floating_tensors(model).items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelLoadError(
                f"tensor {name!r} has values that {str(dtype).removeprefix('torch.')} cannot hold",
                remedy="export as bf16 or fp32; where that fails too, the checkpoint itself holds NaN or Inf",
            )


def read_saved_heads(source: ModelSource) -> SavedHeads:
    """Return the heads that `wmtp.json` describes; one ordinary head where there is no such file.

    Raises:
        ModelLoadError: the description cannot be understood.
    """
    if WMTP_FILE not in source.names():
        return SavedHeads()
    description = read_source_json(source, WMTP_FILE)
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
        f"{source}/{WMTP_FILE} describes heads this version cannot read: "
        f"format_version={version!r}, horizon={horizon!r}, head={form!r}, offsets={offsets!r}",
        remedy="use a newer version of wmtp, or export the model again",
    )


def saved_head_tensors(
    source: ModelSource, saved: SavedHeads
) -> tuple[Callable[[int], dict[str, Tensor]], str]:
    """Return a function that reads the state dict of head h, and the file it reads.

    Raises:
        ModelLoadError: the checkpoint has learned heads by its description, and no file or no tensors of
            them.
    """
    file = f"{source}/{HEADS_FILE}"
    if HEADS_FILE not in source.names() and len(saved.offsets) > 1:
        raise ModelLoadError(
            f"{source} has {WMTP_FILE} but no {HEADS_FILE}",
            remedy="copy the whole export; the heads are missing",
        )
    tensors = open_tensors(source, HEADS_FILE) if len(saved.offsets) > 1 else {}
    # Before anything of the size that the description claims is built.
    described = {".".join(name.split(".")[:2]) for name in tensors}
    for head in range(1, len(saved.offsets)):
        if saved.form != "teacher_forcing" and f"heads.{head}" not in described:
            raise ModelLoadError(
                f"{file} has no tensor of head {head}, and {WMTP_FILE} says that there are "
                f"{len(saved.offsets)} heads",
                remedy="copy the whole export; the files are of different models",
            )

    def read(head: int) -> dict[str, Tensor]:
        prefix = f"heads.{head}."
        names = [name for name in tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensors[name] for name in names}

    return read, file
