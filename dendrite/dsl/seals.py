"""Lines that tell when they, or what stands before them, are no longer what was written.

    {"journal": 2, …, "seal": "1f0c…"}      the first line's seal is a digest of itself,
    {"asked": …, "seal": "90ab…"}           every other's one of the seal before it and itself

So a changed, a missing and a moved line are found, and what follows the last whole line is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_LENGTH = 16
_END = b'"}'
_START = b', "seal": "'


class BrokenSeal(ValueError):
    """The line, or one before it, was changed or is missing."""


def sealed(line: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    """A line as it is written, and its seal.

    Args:
        line: plain values, and not empty.
        before: the seal of the line before it; empty for the first one.
    """
    # What broken decoding left in a text is written as it is: a search must not end over it.
    body = json.dumps(line, ensure_ascii=False).encode(errors="surrogatepass")
    seal = _digest(body, before)
    return body[:-1] + _START + seal.encode() + _END + b"\n", seal


def unsealed(written: bytes, before: str) -> tuple[dict[str, Any], str]:
    """The line that `sealed` wrote, and its seal.

    Raises:
        BrokenSeal: it is another one.
        ValueError: it is no line of this kind at all.
    """
    line: dict[str, Any] = json.loads(written)
    body, start, rest = written.rstrip(b"\n").rpartition(_START)
    if not start:
        raise BrokenSeal("there is no seal")
    seal = rest[:_LENGTH].decode(errors="replace")
    if rest[_LENGTH:] != _END or _digest(body + b"}", before) != seal:
        raise BrokenSeal("it does not fit its seal")
    del line["seal"]
    return line, seal


def _digest(body: bytes, before: str) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()[:_LENGTH]
