"""Chats as pieces of text: what the assistant wrote is a target, the template's and others' text is not."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from wmtp.components.data.examples import Example
from wmtp.components.tokenizer.encoding import Piece
from wmtp.exceptions import DataError


def chat_pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Render a chat with the tokenizer's template and cut it at the assistant's turns.

    An assistant's turn is what the template adds when the turn follows the generation prompt: the content
    and what closes it, so that the model learns to stop. A weight per message weighs the assistant's turns;
    weights of other turns are not used.

    Raises:
        DataError: the tokenizer has no chat template, the template refuses the chat, or it writes a turn
            differently depending on what follows, so that no text can be called the turn's own.
    """
    messages = [dict(message) for message in example.messages or ()]
    if tokenizer.chat_template is None:
        raise DataError(
            f"{example.row_id} is a chat, but the tokenizer {tokenizer.name_or_path!r} has no chat template",
            remedy="use the tokenizer of an instruction model, or rows with prompt and completion",
        )
    whole = _render(example, tokenizer, messages, add_generation_prompt=False)
    pieces: list[Piece] = []
    at = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Templates look at the first message, so there is no rendering of none.
        before = (
            "" if number == 0 else _render(example, tokenizer, messages[:number], add_generation_prompt=True)
        )
        through = _render(example, tokenizer, messages[: number + 1], add_generation_prompt=False)
        if not (whole.startswith(through) and through.startswith(before) and at <= len(before)):
            raise DataError(
                f"{example.row_id}: the chat template writes messages[{number}] differently depending on "
                "what follows it",
                remedy="give each assistant turn as a row of its own, with the turns before it",
            )
        pieces.append(Piece(whole[at : len(before)], is_target=False))
        pieces.append(
            Piece(whole[len(before) : len(through)], is_target=True, weight=_weight(example, number))
        )
        at = len(through)
    pieces.append(Piece(whole[at:], is_target=False))
    return pieces


def _weight(example: Example, number: int) -> float | None:
    if not isinstance(example.weight, list):
        return example.weight
    weight = example.weight[number]
    if isinstance(weight, dict):
        raise DataError(f"{example.row_id}: a chat cannot be weighted by character spans")
    return weight


def _render(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool,
) -> str:
    try:
        text: Any = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise DataError(
            f"{example.row_id}: the tokenizer's chat template refuses the messages: {error}",
            remedy="use the roles, and their order, that the template knows",
        ) from error
    return str(text)
