"""A value function on top of the MTP model: how much reward the document will get, told after each token.

Shapes: B batch, S sequence, D hidden size.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.modeling.formats.sources import read_json
from wmtp.modeling.formats.tensors import (
    check_tensors,
    disk_errors_of_safetensors,
    shapes_of,
    tensor_shapes,
)
from wmtp.modeling.mtp_model import MTPModel
from wmtp.modeling.outputs import MTPOutput

ValueHeadForm = Literal["transformer", "mlp", "linear"]
VALUE_HEAD_FORMS = ("transformer", "mlp", "linear")
WEIGHTS_FILE = "value_head.safetensors"
DESCRIPTION_FILE = "value_head.json"
FORMAT_VERSION = 1


class ValueHead(nn.Module):
    """Maps hidden states to one value a token, starting at exactly zero.

    Forms: `transformer` runs a decoder layer of its own on the trunk (a copy of the model's last layer at
    the start), then a norm and a linear map; `mlp` and `linear` read head 0's last hidden state. The decoder
    layer is the default because it can attend: on a frozen base that solves a task, the last hidden state
    alone need not say whether the program so far is right.

    Args:
        form: which of the three.
        hidden_size: D.
        layer: decoder layer of the form `transformer`, None for the others.
        norm: norm of the form `transformer`, None for the others.
    """

    def __init__(
        self,
        form: ValueHeadForm,
        hidden_size: int,
        *,
        layer: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if form not in VALUE_HEAD_FORMS:
            raise UserInputError(
                f"unknown value head form {form!r}", remedy=f"choose one of: {', '.join(VALUE_HEAD_FORMS)}"
            )
        self.form = form
        self.hidden_size = hidden_size
        self.layer = layer
        self.norm = norm
        self.hidden_map = nn.Linear(hidden_size, hidden_size) if form == "mlp" else None
        self.value_map = nn.Linear(hidden_size, 1)
        # Zero values are an honest start: the first deltas are zero, so the first weights are uniform.
        nn.init.zeros_(self.value_map.weight)
        nn.init.zeros_(self.value_map.bias)

    @classmethod
    def from_model(cls, model: MTPModel, *, form: ValueHeadForm = "transformer") -> Self:
        """Build a value head for a model, on its device.

        Raises:
            UserInputError: an unknown form.
        """
        if form == "transformer":
            layer, norm = copy.deepcopy(model.last_layer), copy.deepcopy(model.final_norm)
            head = cls(form, model.hidden_size, layer=layer, norm=norm)
        else:
            head = cls(form, model.hidden_size)
        # A frozen base gives frozen copies, and this head is what is to be trained.
        return head.to(model.device).requires_grad_(True)

    def forward(self, output: MTPOutput, *, into_trunk: bool = False) -> Tensor:
        """Return values [B,S] in fp32: entry t is the value after the tokens up to and including t.

        The gradient stops at the hidden states that are read, unless `into_trunk`.
        """
        source = output if into_trunk else output.detach()
        if self.layer is None or self.norm is None:
            hidden_BSD = source.hidden_BSHD[:, :, 0]
        else:
            state_BSD = source.trunk.layer_arguments.run_layer(self.layer, source.trunk_BSD)
            hidden_BSD = self.norm(state_BSD)
        if self.hidden_map is not None:
            hidden_BSD = nn.functional.silu(self.hidden_map(hidden_BSD.to(self.hidden_map.weight.dtype)))
        # In fp32 also under autocast: values are differenced, and 16 bits would leave noise.
        with torch.autocast(hidden_BSD.device.type, enabled=False):
            value_map = self.value_map
            values_BS1 = nn.functional.linear(
                hidden_BSD.float(), value_map.weight.float(), value_map.bias.float()
            )
        return values_BS1.squeeze(-1)

    def save(self, directory: str | Path) -> None:
        """Write `value_head.safetensors` and `value_head.json`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with disk_errors_of_safetensors(directory / WEIGHTS_FILE):
            save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        description = {"format_version": FORMAT_VERSION, "form": self.form, "hidden_size": self.hidden_size}
        text = json.dumps(description, indent=2, sort_keys=True) + "\n"
        (directory / DESCRIPTION_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path, model: MTPModel) -> Self:
        """Read a value head that was trained on a model of the same architecture.

        Raises:
            ModelLoadError: files missing or damaged, an unknown form, or tensors that are missing or do not
                fit the model; the message names file and tensor.
        """
        directory = Path(directory)
        for name in (DESCRIPTION_FILE, WEIGHTS_FILE):
            if not (directory / name).is_file():
                raise ModelLoadError(
                    f"{directory} has no {name}",
                    remedy="give a directory written by the critic's first stage",
                )
        description = read_json(directory / DESCRIPTION_FILE)
        version, form = description.get("format_version"), description.get("form")
        if version != FORMAT_VERSION or form not in VALUE_HEAD_FORMS:
            raise ModelLoadError(
                f"{directory / DESCRIPTION_FILE} describes a value head this version cannot read: "
                f"format_version={version!r}, form={form!r}",
                remedy="use a newer version of wmtp, or train the value head again",
            )
        head = cls.from_model(model, form=form)
        file = directory / WEIGHTS_FILE
        check_tensors(file, shapes_of(head.state_dict()), tensor_shapes(file))
        head.load_state_dict(load_file(file))
        return head
