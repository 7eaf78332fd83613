"""What every section of the settings shares: strict parsing, and rules that span several fields.

Parsing is strict: text is never taken for a number, nor a whole number for true or false. The loader, which
knows YAML and the environment, does all reading of text; a section only checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

RULE_ERROR_TYPE = "wmtp_rule"

Text = Annotated[str, Field(min_length=1)]
"""Text that is not empty."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed that torch, numpy and Python's random all take."""

Ratio = Annotated[float, Field(gt=0.0, le=1.0)]
"""A share that is not nothing."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share that may be nothing."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors, numbers are finite, instances do not change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
        validate_default=True,
        hide_input_in_errors=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _read_empty_section(cls, value: Any) -> Any:
        """Take `loss:` with nothing under it for a section whose keys all have their defaults."""
        return {} if value is None else value


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule over several fields that does not hold.

    `key` is the dotted key to change; `involves` are the other dotted keys that the rule read.
    """

    key: str
    rule: str
    remedy: str
    involves: Sequence[str] = ()


def raise_violations(violations: Iterable[Violation]) -> None:
    """Raise one pydantic error that carries every violation, for use in an `after` validator."""
    found = list(violations)
    if found:
        text = "; ".join(f"{violation.key}: {violation.rule} ({violation.remedy})" for violation in found)
        # Braces are doubled because pydantic formats the template with the context.
        template = text.replace("{", "{{").replace("}", "}}")
        raise PydanticCustomError(RULE_ERROR_TYPE, template, {"violations": found})
