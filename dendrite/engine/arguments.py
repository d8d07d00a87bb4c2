"""What users hand over, checked before anything is changed: a wrong type would otherwise end up deep in a step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import SupportsFloat, TypeGuard

from dendrite.engine.errors import RequestError


def checked_text(text: object, name: str) -> str:
    """Text that can be encoded.

    Raises:
        RequestError: something else, or text with half a surrogate pair, as broken decoding leaves it.
    """
    if not isinstance(text, str):
        raise RequestError(f"{name} {shortened(text)} cannot be used: give text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{name} has half a character, {text[error.start]!r}, at {error.start}: decode its bytes with "
                'errors="replace"'
            ) from None
    return text


def checked_ids(token_ids: object, name: str, *, vocab_size: int) -> list[int]:
    """Token ids of this vocabulary, from a list, an array or a tensor.

    Raises:
        RequestError: something else, or one that is out of range.
    """
    if isinstance(token_ids, str | bytes) or not isinstance(token_ids, Iterable):
        raise RequestError(f"{name} {shortened(token_ids)} cannot be used: give token ids, a list of whole numbers")
    ids: list[int] = list(token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids)
    if set(map(type, ids)) != {int}:  # a quarter of the time of looking at each
        wrong = [token for token in ids if not is_whole(token)]
        if wrong:
            raise RequestError(f"{name} holds {shortened(wrong[0])}, which is no token id: give whole numbers")
        ids = list(map(int, ids))
    out = next((token for token in (min(ids), max(ids)) if not 0 <= token < vocab_size), None) if ids else None
    if out is not None:
        raise RequestError(f"token id {out} is out of range: the vocabulary has {vocab_size} tokens")
    return ids


def checked_seed(seed: object) -> int | None:
    """A whole number, or None.

    Raises:
        RequestError: something else.
    """
    if seed is None or is_whole(seed):
        return None if seed is None else int(seed)
    raise RequestError(f"seed={shortened(seed)} cannot be used: give a whole number, or None")


def checked_number(number: object, name: str) -> float:
    """A number to sort by.

    Raises:
        RequestError: no number, or NaN, which is neither more nor less than another.
    """
    found = as_number(number)
    if found is None or math.isnan(found):
        raise RequestError(f"{name}={shortened(number)} cannot be used: give a number")
    return found


def as_number(value: object) -> float | None:
    """A number of any library as Python's own; None if it is none."""
    if type(value) is float:  # to ask for the protocol takes as long as a fork
        return value
    if isinstance(value, type) or not isinstance(value, SupportsFloat):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # more than one number, or more than a float holds
        return None


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, of Python's or NumPy's, and no truth value."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))  # a fork asks this


def shortened(value: object) -> str:
    """The value as a message shows it."""
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:77]}..."
