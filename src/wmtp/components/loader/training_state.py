"""Models out of training checkpoints, which describe the model they hold beside its tensors."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from wmtp.distributed.checkpoint_reading import STATE_NAME, Checkpoint
from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.configuration import build_config, causal_lm_class, check_config, text_config
from wmtp.modeling.formats.parts import LoadedParts
from wmtp.modeling.formats.tensors import check_tensors, shapes_of
from wmtp.modeling.heads import HEAD_FORMS, SavedHeads, check_offsets
from wmtp.modeling.state_dict import set_precision, tied_names

ARCHITECTURE_KEY = "architecture"
_TRUNK = "causal_lm."


def describe_architecture(model: MTPModel) -> dict[str, Any]:
    """What the JSON state of a checkpoint says of its model, so that it can be built without its base."""
    return {
        "config": json.loads(model.config.to_json_string()),
        "head": model.head_form,
        "offsets": list(model.offsets),
    }


def holds_adapters_only(state: dict[str, Any]) -> bool:
    """Whether a checkpoint's state is one of LoRA, whose frozen tensors are in the base model alone."""
    return state.get("base") is not None


def read_training_state(checkpoint: Checkpoint, *, dtype: torch.dtype) -> LoadedParts:
    """Read the model of a training checkpoint.

    Raises:
        CheckpointError: a file of it is damaged.
        ModelLoadError: it does not describe its model, holds adapters only, or its tensors do not fit.
    """
    saved, content, file = describe_training_state(checkpoint)
    tensors = checkpoint.read("model")
    weights = f"{checkpoint.info.uri}/model"
    check_config(content, file, len(tensors))
    causal_lm = _build(content, file)
    _fill(causal_lm, tensors, weights)
    # Training keeps the parameters in fp32; whoever only uses the model may want less.
    set_precision(causal_lm, dtype)
    causal_lm.eval()  # type: ignore[no-untyped-call]

    def head_tensors(head: int) -> dict[str, Tensor]:
        prefix = f"extra_heads.{head - 1}."
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    return LoadedParts(causal_lm, saved, head_tensors, weights)


def describe_training_state(checkpoint: Checkpoint) -> tuple[SavedHeads, dict[str, Any], str]:
    """Read what `read_training_state` would build, without its tensors.

    Returns:
        Its heads, the content of its configuration, and the file that says so.

    Raises:
        CheckpointError, ModelLoadError: as `read_training_state`.
    """
    state, uri = checkpoint.state, checkpoint.info.uri
    if holds_adapters_only(state):
        raise ModelLoadError(
            f"{uri} holds LoRA adapters and heads only; the other tensors are those of its base model",
            remedy="evaluate or export it with the recipe of the run, which names the base",
        )
    file = f"{uri}/{STATE_NAME}"
    described = state.get(ARCHITECTURE_KEY)
    try:
        if isinstance(described, dict) and isinstance(described["config"], dict):
            form = described["head"]
            if form in HEAD_FORMS:
                return SavedHeads(form, check_offsets(described["offsets"])), described["config"], file
    except (UserInputError, KeyError, TypeError):
        pass
    raise ModelLoadError(
        f"{file} does not describe the model ({ARCHITECTURE_KEY}: config, head, offsets)",
        remedy="it was written by another version of wmtp; resume the run, or use its `final` folder",
    )


def _build(content: dict[str, Any], file: str) -> PreTrainedModel:
    """Build the model with parameters that hold nothing yet."""
    config = build_config(content, file)
    model_class = causal_lm_class(config, file)
    with torch.random.fork_rng(devices=[]), no_init_weights():
        model: PreTrainedModel = model_class(text_config(config, model_class))
    model.tie_weights()  # part of the initialisation that was left out
    return model


def _fill(causal_lm: PreTrainedModel, tensors: dict[str, Tensor], file: str) -> None:
    own = {name.removeprefix(_TRUNK): t for name, t in tensors.items() if name.startswith(_TRUNK)}
    for name, kept in tied_names(causal_lm).items():
        if name in own:
            # The configuration ties them and the base had two different ones, which stay apart.
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(torch.empty_like(causal_lm.get_parameter(name)))
            setattr(causal_lm.get_submodule(owner), leaf, parameter)
        elif kept in own:
            own[name] = own[kept]
    check_tensors(file, shapes_of(causal_lm.state_dict()), shapes_of(own))
    causal_lm.load_state_dict(own)
