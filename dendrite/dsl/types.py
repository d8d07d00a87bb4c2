"""The type variables and aliases that the rooms of the DSL share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NewType, TypeGuard

from typing_extensions import TypeVar

from dendrite.engine.arguments import as_number, checked_text
from dendrite.engine.chat import check_messages
from dendrite.engine.errors import RequestError
from dendrite.engine.messages import Message

S = TypeVar("S", default=object)
"""A user's state; a bare `dd.Node` is a `dd.Node[object]`, which fits every program."""
S_co = TypeVar("S_co", covariant=True, default=object)
F = TypeVar("F", bound=Callable[..., object])

Prompt = str | Sequence[Message]
"""Text, or chat messages."""

StepId = NewType("StepId", int)
"""A node's number in its search, in the order made; the root is 0."""

OnError = Literal["raise", "drop"]
"""What a run does about a function that raises or returns nonsense: end, or drop the nodes it was called for."""


def shown(prompt: Prompt, *, first: bool = False) -> str:
    """Write a prompt as a transcript shows it: text as it is, messages as `role: content` lines.

    Messages end where the assistant's answer begins. `first` says that nothing stands before them.
    """
    if isinstance(prompt, str):
        return prompt
    if not prompt:
        return ""
    lines = [f"{message['role']}: {message['content']}" for message in prompt]
    return ("" if first else "\n") + "\n".join([*lines, "assistant: "])


def is_prompt(value: object) -> TypeGuard[Prompt]:
    """Whether it is text that can be encoded, or a list or tuple of messages of known roles; either may be empty."""
    try:
        if isinstance(value, list | tuple):
            if value:
                check_messages(value)
        else:
            checked_text(value, "prompt")
    except RequestError:
        return False
    return True


def as_finite(value: object) -> float | None:
    """A finite number of any library as Python's own; None if it is none."""
    number = as_number(value)
    return number if number is not None and math.isfinite(number) else None
