"""A chat message, in a file of its own without imports beyond `typing`, so that the DSL can name it at no cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a conversation, as chat templates read it."""

    role: Role
    content: str
    name: NotRequired[str]
    """Of the tool that a `tool` turn answers for; templates that know no names leave it out."""
    tool_calls: NotRequired[Sequence[Mapping[str, object]]]
    """An assistant's calls, as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, for templates
    that write calls themselves."""
    token_ids: NotRequired[Sequence[int]]
    """The tokens that `content` was generated as. They are used in place of encoding it again, which for about half of
    sampled texts would give other tokens, so that what the model wrote stays as it wrote it."""
