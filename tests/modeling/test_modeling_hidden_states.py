"""Hidden states are found in every kind of output, and a failure says what was there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from modeling_families import build_causal_lm, random_tokens

from wmtp.modeling import extract_hidden_states

FIRST, LAST = torch.zeros(2, 5, 8), torch.ones(2, 5, 8)


@pytest.mark.parametrize("kind", [dict, SimpleNamespace], ids=["dict", "object"])
@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_states": (FIRST, LAST)},
        {"hidden_states": [FIRST, LAST]},
        {"hidden_states": LAST},
        {"hidden_states": (FIRST, LAST), "last_hidden_state": FIRST},
        {"hidden_states": None, "last_hidden_state": LAST},
        {"last_hidden_state": LAST, "logits": FIRST},
    ],
)
def test_fields_in_their_order_of_precedence(kind: type, fields: dict) -> None:
    assert extract_hidden_states(kind(**fields)) is LAST


@pytest.mark.parametrize(
    "outputs",
    [
        (LAST,),
        (FIRST, LAST),
        [FIRST, LAST],
        (torch.zeros(2, 5, 97), (FIRST, LAST)),
        (torch.tensor(1.0), torch.zeros(2, 5, 97), [FIRST, LAST]),
        (LAST, None, torch.zeros(2, 8)),
    ],
)
def test_tuples(outputs: tuple) -> None:
    assert extract_hidden_states(outputs) is LAST


def test_outputs_of_a_real_model_with_and_without_a_dict() -> None:
    model, tokens = build_causal_lm("llama"), random_tokens()
    with torch.no_grad():
        expected = model.model(tokens).last_hidden_state
        assert torch.equal(extract_hidden_states(model(tokens, output_hidden_states=True)), expected)
        assert torch.equal(extract_hidden_states(model.model(tokens)), expected)
        assert torch.equal(
            extract_hidden_states(
                model(tokens, output_hidden_states=True, return_dict=False, use_cache=False)
            ),
            expected,
        )


@pytest.mark.parametrize(
    ("outputs", "shown"),
    [
        ({"logits": torch.zeros(2, 5, 97)}, r"logits: Tensor \[2, 5, 97\]"),
        ({"hidden_states": torch.zeros(5, 8)}, r"must be \[B,S,D\], got Tensor \[5, 8\]"),
        ({"hidden_states": []}, "empty list"),
        ({"hidden_states": torch.zeros(2, 5, 8, dtype=torch.long)}, "int64"),
        ({"last_hidden_state": "text"}, "got str"),
        (SimpleNamespace(logits=1), "SimpleNamespace with attributes logits"),
        ((torch.zeros(2, 8), None), r"\[0\]: Tensor \[2, 8\].*\[1\]: NoneType"),
        ((torch.zeros(2, 5, 97), LAST), "different shapes"),
        ((), "nothing"),
        (None, "NoneType"),
        ("text", "str"),
    ],
)
def test_an_error_is_a_value_error_that_lists_what_was_there(outputs: object, shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        extract_hidden_states(outputs)
