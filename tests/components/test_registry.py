"""The registry: keys, categories, versions, and errors that list what is known."""

from __future__ import annotations

import pytest

from wmtp.components.registry import UnifiedRegistry, collator_registry, registry, trainer_registry
from wmtp.exceptions import UserInputError

SPECIFIED = {
    "loader": {"unified-model-loader", "unified-data-loader", "checkpoint-loader"},
    "trainer": {"baseline-mtp", "critic-wmtp", "rho1-wmtp", "mtp-weighted-ce", "mtp-weighted-ce-trainer"},
    "scorer": {"critic-delta-v1", "rho1-excess-v1", "dft", "column", "head_decay"},
    "pretrainer": {"critic-head-pretrainer"},
    "collator": {"lm-data-collator", "mtp-data-collator"},
    "tokenizer": {"hf"},
    "optimizer": {"adamw"},
    "evaluator": {"meta-mtp", "perplexity", "token-accuracy"},
}


def test_every_built_in_key_is_registered_with_a_description() -> None:
    for category, keys in SPECIFIED.items():
        found = {registration.key: registration for registration in registry.list(category)}
        assert keys <= found.keys(), category
        assert all(registration.description for registration in found.values())


def test_both_ways_to_register_file_the_same_way() -> None:
    own = UnifiedRegistry()

    class Mine:
        """What mine does.

        More.
        """

        def __init__(self, config: object) -> None:
            self.config = config

    assert own.register("mine", category="collator", version="2.0.0")(Mine) is Mine
    registration = own.get("mine", category="collator")
    assert (registration.version, registration.description) == ("2.0.0", "What mine does.")
    assert own.create("mine", {"a": 1}, category="collator").config == {"a": 1}


def test_a_category_may_be_repeated_and_must_then_be_right() -> None:
    with pytest.raises(UserInputError, match="collator"):
        collator_registry.register("x", category="trainer")
    trainer_registry.register("baseline-mtp", category="trainer", version="1.0.0")(
        trainer_registry.get("baseline-mtp").component
    )


def test_an_unknown_key_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(UserInputError) as error:
        trainer_registry.get("rho-wmtp")
    assert "did you mean 'rho1-wmtp'" in str(error.value)
    assert "baseline-mtp" in str(error.value)


def test_an_unknown_category_lists_the_categories() -> None:
    with pytest.raises(UserInputError, match="scorer"):
        registry.get("x", category="wheels")


def test_a_taken_key_is_refused() -> None:
    own = UnifiedRegistry()
    own.register("k", category="scorer")(type("First", (), {"__doc__": "One."}))
    with pytest.raises(UserInputError, match="already taken"):
        own.register("k", category="scorer")(type("Second", (), {"__doc__": "Two."}))
