"""Whether a program printed what it should: the comparison of the authors of CodeContests.

Used by the supervisor, on the trusted side; the program never sees what is expected.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

_TOKEN = re.compile(rb"[^ \n\t\r\v]+")
_INTEGER = re.compile(rb"[+-]?[0-9]+")
_NUMBER = re.compile(rb"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?")
_MAX_NUMBER_BYTES = 400  # longer ones are compared as text: parsing takes time that grows with the square
_TOLERANCE = 1e-5


def outputs_match(actual: bytes | str, expected: bytes | str) -> bool:
    """Compare token by token, as `OutputsMatch` of the CodeContests repository does.

    Tokens are what stands between whitespace (space, newline, tab, carriage return, vertical tab). Equal are
    tokens with the same text but for the case of ASCII letters, and numbers that differ by less than 1e-5.
    One thing is stricter than there: two whole numbers are compared exactly, however large, where that
    program compares them as doubles.

    Source: Li et al. 2022 ("Competition-Level Code Generation with AlphaCode"), the published checker.
    """
    pairs = itertools.zip_longest(_tokens(actual), _tokens(expected))
    return all(one is not None and two is not None and _tokens_match(one[0], two[0]) for one, two in pairs)


def _tokens(text: bytes | str) -> Iterator[re.Match[bytes]]:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return _TOKEN.finditer(data.lower())  # of bytes: only ASCII letters have a case


def _tokens_match(one: bytes, two: bytes) -> bool:
    if one == two:
        return True
    if max(len(one), len(two)) > _MAX_NUMBER_BYTES:
        return False
    if _INTEGER.fullmatch(one) and _INTEGER.fullmatch(two):
        return int(one) == int(two)
    if _NUMBER.fullmatch(one) and _NUMBER.fullmatch(two):
        return abs(float(one) - float(two)) < _TOLERANCE
    return False
