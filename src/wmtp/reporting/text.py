"""Numbers and texts as people read them."""

from __future__ import annotations

import math
import unicodedata


def format_duration(seconds: float) -> str:
    """Write a time for people: `0.8 s`, `42 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_percent(fraction: float) -> str:
    """Write a fraction as `84.5%`; whole numbers lose the `.0`."""
    return f"{100 * fraction:.1f}".removesuffix(".0") + "%"


def format_number(value: float) -> str:
    """Write a measured value with four significant digits, without an exponent where that stays short."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        return text.replace("-", "\u2212")
    return f"{value:.3g}".replace("-", "\u2212")


def visible(text: str) -> str:
    """Make a text safe to show: signs that act on the reader's screen become signs that are seen.

    Control characters become their pictures (NUL is shown as U+2400), those that change the writing direction
    and lone surrogates become escapes; line feed and tab stay.
    """
    return "".join(_visible_sign(sign) for sign in text.replace("\r\n", "\n"))


def _visible_sign(sign: str) -> str:
    code = ord(sign)
    if sign in "\n\t":
        return sign
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    # Cc: C1 controls; Cs: surrogates; Cf: direction marks, zero-width signs and the like.
    if unicodedata.category(sign) in ("Cc", "Cs") or unicodedata.bidirectional(sign) in _DIRECTION_CLASSES:
        return f"\\u{code:04x}"
    return sign


_DIRECTION_CLASSES = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
