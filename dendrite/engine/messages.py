"""A chat message, in a file of its own without imports beyond `typing`, so that the DSL can name it at no cost."""

from __future__ import annotations

from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a conversation, as chat templates read it."""

    role: Role
    content: str
