"""Texts coloured by token weight: for the page, for Markdown, for the terminal."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text

from wmtp.reporting.data import TokenView
from wmtp.reporting.text import visible

_BARS = "▁▂▃▄▅▆▇█"
# Weights are shown on a logarithmic scale around 1: full warm colour at 3 (the default bound), full cold at
# 1/20.
_FULL_ABOVE = 3.0
_FULL_BELOW = 0.05
_WARM, _COLD, _PAPER = (232, 119, 34), (58, 120, 200), (24, 26, 30)


@dataclass(frozen=True, slots=True)
class ShadedToken:
    """A token to show: text, strength of its colour from -1 (unimportant) to 1 (important), hint."""

    text: str
    shade: float | None
    hint: str


def shade(weight: float) -> float:
    """Map a weight to -1 .. 1; 1 (the mean) is 0, the same ratio is the same distance."""
    if weight >= 1.0:
        return min(1.0, math.log(weight) / math.log(_FULL_ABOVE))
    if weight <= _FULL_BELOW:
        return -1.0
    return -math.log(weight) / math.log(_FULL_BELOW)


def shaded_tokens(view: TokenView) -> list[ShadedToken]:
    """Prepare a text for showing; a line feed gets a sign, so that its colour is seen."""
    result = []
    for index, (token, weight) in enumerate(zip(view.tokens, view.weights, strict=True)):
        shown = visible(token).replace("\n", "↵\n") if weight is not None else visible(token)
        result.append(ShadedToken(shown, None if weight is None else shade(weight), _hint(view, index)))
    return result


def heaviest_tokens(view: TokenView, count: int = 8) -> list[tuple[str, float]]:
    """The tokens with the largest weights as `(text, weight)`, heaviest first, ties in order of the text."""
    weighted = [
        (weight, index, token)
        for index, (token, weight) in enumerate(zip(view.tokens, view.weights, strict=True))
        if weight is not None
    ]
    weighted.sort(key=lambda item: (-item[0], item[1]))
    return [(_standalone(token), weight) for weight, _, token in weighted[:count]]


def tokens_as_lines(view: TokenView) -> list[str]:
    """Draw the weights as plain text: under each line of the text a line of bars, higher is heavier."""
    lines: list[str] = []
    text, bars = "", ""
    for token, weight in zip(view.tokens, view.weights, strict=True):
        bar = " " if weight is None else _BARS[round((shade(weight) + 1) / 2 * (len(_BARS) - 1))]
        for sign in visible(token).replace("\t", "    "):
            if sign == "\n":
                lines += [text.rstrip(), bars.rstrip()]
                text, bars = "", ""
                continue
            text += sign
            bars += bar * _width(sign)
    lines += [text.rstrip(), bars.rstrip()]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def tokens_for_terminal(view: TokenView) -> Text:
    """Colour the text for a terminal: warm for heavy tokens, cold for light ones, none without a weight."""
    result = Text()
    for token in shaded_tokens(view):
        style = Style() if token.shade is None else Style(color="white", bgcolor=f"rgb{_blend(token.shade)}")
        result.append(token.text.replace("\t", "    "), style)
    return result


def _standalone(token: str) -> str:
    # On its own a token of blanks would be invisible.
    shown = visible(token).replace("\n", "↵").replace("\t", "⇥")
    return shown.replace(" ", "·") if not shown.strip(" ") else shown


def _hint(view: TokenView, index: int) -> str:
    weight = view.weights[index]
    parts = ["no weight" if weight is None else f"weight {weight:.2f}"]
    if view.ce:
        parts += [
            f"CE head {head + 1} {value:.2f}"
            for head, value in enumerate(view.ce[index])
            if value is not None
        ]
    return " · ".join(parts)


def _blend(strength: float) -> str:
    full = _WARM if strength >= 0 else _COLD
    amount = 0.75 * abs(strength)
    mixed = [round(paper + amount * (color - paper)) for paper, color in zip(_PAPER, full, strict=True)]
    return f"({mixed[0]},{mixed[1]},{mixed[2]})"


def _width(sign: str) -> int:
    return 2 if unicodedata.east_asian_width(sign) in ("W", "F") else 1
