"""A causal language model that predicts several tokens at once.

The trunk is every decoder layer but the last. Head 0 is the model's own last layer; the further heads, in one
of the forms of `wmtp.modeling.heads`, start from the trunk or from the head before. All share the model's
final norm and unembedding (Gloeckle et al., 2024, "Better & Faster Large Language Models via Multi-token
Prediction").

Shapes: B batch, S sequence, H heads (horizon), V vocabulary, D hidden size. Head h (0-based) at position t
predicts token t + offsets[h], by default t+h+1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from wmtp.exceptions import UserInputError
from wmtp.modeling.drafting import HeadsSession, attention_windows, check_can_draft, verify_drafting
from wmtp.modeling.formats.export import save_mtp_model
from wmtp.modeling.formats.load import load_mtp_model
from wmtp.modeling.formats.sources import ModelSource
from wmtp.modeling.generation import GenerateKeywords, GenerateOptions, GenerateOutput, generate_tokens
from wmtp.modeling.heads import (
    Adapter,
    HeadForm,
    HeadInputs,
    HeadRequest,
    SavedHeads,
    build_heads,
    check_offsets,
    plan_heads,
    shift_left,
)
from wmtp.modeling.lora import LoraAdapters
from wmtp.modeling.outputs import MTPOutput, TrunkOutput
from wmtp.modeling.packing import plan_attention
from wmtp.modeling.probe import verify_document_isolation, verify_structure
from wmtp.modeling.recording import LastLayerRecorder, LastLayerTap
from wmtp.modeling.state_dict import drop_tied_copies, restore_tied_copies
from wmtp.modeling.wrapped import WrappedModel


class MTPModel(WrappedModel):
    """Wraps a Hugging Face decoder-only causal language model and adds heads for the tokens after the next.

    Args:
        causal_lm: the model to wrap; it is kept, not copied.
        form: form of heads 1..H-1; see `wmtp.modeling.heads`.
        offsets: how far ahead each head predicts, in tokens: increasing, the first 1. One number a head.

    Raises:
        ModelLoadError: the model's structure is not understood, found by comparing head 0 with the model
            itself.
        UserInputError: offsets that do not increase from 1.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, *, form: HeadForm = "transformer", offsets: Sequence[int] = (1,)
    ) -> None:
        super().__init__(causal_lm)
        self.head_form = form
        self.offsets = check_offsets(offsets)
        self.extra_heads = build_heads(self._parts, form, self.offsets, self.hidden_size)
        # Set by `wmtp.modeling.lora.add_lora`.
        self.lora: LoraAdapters | None = None
        self._structure_verified = False
        self._documents_verified = False
        # How far its layers see; known once drafting has been verified.
        self._windows: dict[str, int | None] | None = None
        self.register_state_dict_post_hook(drop_tied_copies)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(restore_tied_copies)  # type: ignore[no-untyped-call]
        if not self._is_on_meta_device:
            self._verify_structure()

    # ---------------------------------------------------------------- construction

    @classmethod
    def from_causal_lm(
        cls,
        causal_lm: PreTrainedModel,
        *,
        horizon: int,
        head: HeadForm = "transformer",
        adapter: Adapter = "heads",
        offsets: Sequence[int] | None = None,
    ) -> Self:
        """Wrap a model in memory and give it new heads.

        Args:
            causal_lm: the model to wrap; it is kept, not copied.
            horizon: number of heads H.
            head: form of heads 1..H-1. Decoder layers start as copies of the model's last one.
            adapter: `heads` adds heads of that form; `teacher_forcing` shifts the ordinary logits in their
                place; `fallback` goes on with one head and warns.
            offsets: how far ahead each head predicts; default 1..H.

        Raises:
            UserInputError: horizon below 1, offsets that do not fit it, an unknown head form or adapter.
            ModelLoadError: the model is not a decoder-only causal language model of a known structure.
        """
        request = HeadRequest(horizon=horizon, head=head, adapter=adapter, offsets=offsets)
        plan = plan_heads(request, SavedHeads(), type(causal_lm).__name__)
        return cls(causal_lm, form=plan.form, offsets=plan.offsets)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | ModelSource,
        *,
        horizon: int | None = None,
        head: HeadForm | None = None,
        adapter: Adapter = "heads",
        offsets: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a model of any kind: Hugging Face, Meta MTP native, or a WMTP export; a directory or a hub id.

        Args:
            path: a directory, or a hub id `org/name` or `org/name:subfolder`; or the source of the files.
            horizon: number of heads; None takes what the checkpoint has (1 for a plain model). Fewer than it
                has uses the first ones and warns; more adds new ones.
            head: form of the heads; None takes the checkpoint's (`transformer` for a plain model).
            adapter: how a checkpoint with too few heads gets more, as for `from_causal_lm`.
            offsets: how far ahead each head predicts; None takes the checkpoint's, or 1..H.
            dtype: of the parameters in memory.
            trust_remote_code: let the checkpoint run its own code. Off unless the user says so.

        Raises:
            ModelLoadError: files missing, unreadable or not fitting; the message names file and tensor.
            UserInputError: a horizon, head form, adapter or offsets that cannot be had from this checkpoint.
        """
        return load_mtp_model(
            cls,
            path,
            HeadRequest(horizon=horizon, head=head, adapter=adapter, offsets=offsets),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )

    def save_pretrained(
        self,
        path: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the export: a directory that `AutoModelForCausalLM` loads as an ordinary next-token model.

        Beside it stand `mtp_heads.safetensors` (heads 1..H-1) and `wmtp.json` (horizon, head form,
        `metadata`), from which `from_pretrained` gets all heads back bit for bit. LoRA adapters are merged
        into what is written. Not atomic; publish the directory yourself.
        """
        save_mtp_model(self, Path(path), tokenizer=tokenizer, metadata=metadata)

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        num_heads: int | None = None,
    ) -> MTPOutput:
        """Run trunk and heads, without the unembedding.

        Args:
            input_ids: [B,S] token ids.
            attention_mask: [B,S], 1 on real tokens and 0 on padding, on either side.
            position_ids: [B,S]; default 0, 1, 2, ... in each document.
            document_ids: [B,S], one number a document, -1 on padding; attention never crosses documents.
            num_heads: run heads 0..num_heads-1 only, e.g. 1 to score; default all.

        Raises:
            UserInputError: shapes that do not fit, or packed documents that this model cannot keep apart.
        """
        num_heads = self.horizon if num_heads is None else num_heads
        if not 1 <= num_heads <= self.horizon:
            raise UserInputError(
                f"num_heads={num_heads}, but this model has {self.horizon} heads",
                remedy=f"choose 1..{self.horizon}",
            )
        trunk = self.run_trunk(input_ids, attention_mask, position_ids, document_ids)
        states = self._run_states(trunk, num_heads)
        hidden_BSHD = torch.stack([self.final_norm(state_BSD) for state_BSD in states], dim=2)
        return MTPOutput(hidden_BSHD, trunk, self.unembed)

    def run_trunk(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> TrunkOutput:
        """Run everything in front of the last decoder layer; arguments as for `forward`."""
        for name, value in {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "document_ids": document_ids,
        }.items():
            if value is not None and value.shape != input_ids.shape:
                raise UserInputError(
                    f"{name} has shape {tuple(value.shape)}, input_ids {tuple(input_ids.shape)}",
                    remedy=f"pass {name} as [B,S] like input_ids",
                )
        plan = plan_attention(attention_mask, position_ids, document_ids)
        # A model that was built without weights is verified at its first forward, packing at its first use.
        if not self._structure_verified:
            self._verify_structure()
        if plan.isolates_documents and not self._documents_verified:
            verify_document_isolation(self)
            self._documents_verified = True
        return self.run_trunk_unchecked(input_ids, plan.attention_mask_BS, plan.position_ids_BS)

    def run_head(self, head: int, trunk: TrunkOutput) -> Tensor:
        """Run one head, and those it reads, then the shared final norm. Returns [B,S,D].

        For all heads `forward` is cheaper where heads read each other (`sequential`, `medusa`, `linear`).
        """
        if head == 0:
            state_BSD = self._run_states(trunk, 1)[0]
        elif self.head_form == "transformer":
            state_BSD = self._run_extra_head(head, trunk, ())
        else:
            num_read = head if self.head_form == "sequential" else 1
            state_BSD = self._run_extra_head(head, trunk, self._run_states(trunk, num_read))
        normed_BSD: Tensor = self.final_norm(state_BSD)
        return normed_BSD

    def run_trunk_unchecked(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cache: Cache | None = None,
    ) -> TrunkOutput:
        """Run the trunk on what the wrapped model takes, with no plan for documents and no check.

        With a cache its layers write to it, and so do layers run with the arguments that come back.
        """
        parts = self._parts
        optional = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": cache,
        }
        given = {name: value for name, value in optional.items() if value is not None}
        recorder = LastLayerRecorder(input_ids)
        # The wrapped model prepares masks and positions in its own way and then meets the recorder where its
        # last layer was. Without a cache, unless one is given: a copied layer keeps its cache index and would
        # attend to head 0's keys.
        last_layer = parts.layers[-1]
        parts.layers[-1] = recorder
        try:
            parts.base(input_ids=input_ids, use_cache=cache is not None, **given)
        finally:
            parts.layers[-1] = last_layer
        return recorder.recorded

    def _verify_structure(self) -> None:
        verify_structure(self)
        self._structure_verified = True

    def _run_states(self, trunk: TrunkOutput, num_heads: int) -> list[Tensor]:
        """Hidden states [B,S,D] of heads 0..num_heads-1 before the final norm."""
        states = [trunk.layer_arguments.run_layer(self.last_layer, trunk.trunk_BSD)]
        for head in range(1, num_heads):
            states.append(self._run_extra_head(head, trunk, states))
        return states

    def _run_extra_head(self, head: int, trunk: TrunkOutput, states: Sequence[Tensor]) -> Tensor:
        def embed_ahead(distance: int) -> Tensor:
            embedding = self.causal_lm.get_input_embeddings()
            return shift_left(embedding(trunk.input_ids_BS), distance)

        state_BSD: Tensor = self.extra_heads[head - 1](HeadInputs(trunk, states, embed_ahead))
        return state_BSD

    # ---------------------------------------------------------------- generation

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        speculative: bool = True,
        **options: Unpack[GenerateKeywords],
    ) -> GenerateOutput:
        """Continue rows of tokens: what head 0 says, with the other heads' drafts to get there faster.

        Greedy tokens are those of plain decoding; sampled ones follow its distribution.

        Args:
            input_ids: [B,P] prompts.
            attention_mask: [B,P], 1 on real tokens and 0 on padding, on either side.
            max_new_tokens: budget of a row, the end-of-sequence token included.
            do_sample: draw tokens; otherwise the most likely one is taken.
            speculative: let the heads draft; False decodes token by token.
            **options: see `wmtp.modeling.GenerateOptions`: sampling, where rows end, how to draft.

        Raises:
            UserInputError: an argument is out of range, or the heads cannot draft.
        """
        return generate_tokens(
            self,
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            speculative=speculative,
            options=GenerateOptions(**options),
        )

    @contextmanager
    def decoding_session(self) -> Iterator[HeadsSession]:
        """Make the heads ready to draft inside the block; see `wmtp.decoding`.

        Raises:
            UserInputError: they cannot draft.
        """
        tap = LastLayerTap()
        with tap.listening(self.last_layer):
            check_can_draft(self)
            session = HeadsSession(self, tap, self._windows or attention_windows(self.config))
            if self._windows is None:
                verify_drafting(session)
                self._windows = session.windows
            yield session

    # ---------------------------------------------------------------- properties

    @property
    def horizon(self) -> int:
        """Number of heads, H."""
        return len(self.offsets)

    @property
    def can_draft(self) -> bool:
        """Whether the heads can guess the next H tokens: one after another, without being given them."""
        is_contiguous = self.offsets == tuple(range(1, self.horizon + 1))
        return is_contiguous and self.horizon > 1 and self.head_form != "teacher_forcing"
