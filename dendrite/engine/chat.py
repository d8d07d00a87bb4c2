"""A conversation as tokens: the model's template writes the text, and turns that were generated keep their very tokens.

template  <user>Hi<end><assistant> M1 <end><user>Go on<end><assistant>        M1 marks a turn with `token_ids`
tokens    └──── encoded ─────────┘└ids┘└─────────── encoded ───────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from dendrite.engine.arguments import checked_text, shortened
from dendrite.engine.errors import RequestError
from dendrite.engine.messages import Message, Role

Write = Callable[[Sequence[Mapping[str, object]]], str]
"""The template: from turns to text."""
Encode = Callable[[str, bool], list[int]]
"""From a piece of that text, and whether the conversation starts with it, to tokens."""

_ROLES: tuple[str, ...] = get_args(Role)
_FOR_TEMPLATES = ("role", "content", "name", "tool_calls")


def conversation_ids(messages: Sequence[Message], write: Write, encode: Encode) -> list[int]:
    """Token ids of checked `messages`.

    Templates may rewrite a turn: strip it, or leave out what the model thought. A stripped one keeps its tokens; one
    that is rewritten otherwise is encoded as the template has it.
    """
    turns = [{key: message[key] for key in _FOR_TEMPLATES if key in message} for message in messages]  # type: ignore[literal-required]  # they are keys of a Message
    whole = write(turns)
    kept = [index for index, message in enumerate(messages) if message.get("token_ids")]
    if not kept or _mark_start() in whole:  # whoever writes a mark goes without kept tokens
        return encode(whole, True)
    marked = write([{**turn, "content": _mark(index)} if index in kept else turn for index, turn in enumerate(turns)])
    ids: list[int] = []
    position = 0  # in `whole`: up to here it is in `ids`, or in `open_text`
    open_text = ""
    for index in kept:
        before, _, marked = marked.partition(_mark(index))
        following = marked.partition(_mark_start())[0]
        position += len(before)
        open_text += before
        text = _as_written(whole, position, messages[index]["content"], following)
        if text is None:  # rewritten: take what stands there instead
            end = whole.find(following, position)
            open_text += whole[position:end]
            position = end
            continue
        ids += [*encode(open_text, not ids), *messages[index]["token_ids"]]
        open_text = ""
        position += len(text)
    open_text += whole[position:]
    return ids + encode(open_text, not ids)


def check_messages(messages: object, *, continue_last: bool = False) -> None:
    """Raise a `RequestError` that says which message cannot be rendered, and why."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError('messages must be one or more of {"role": ..., "content": ...}')
    roles = [_checked_role(index, message) for index, message in enumerate(messages)]
    if continue_last and roles[-1] != "assistant":
        raise RequestError("only a last message of the assistant can be continued")


def _checked_role(index: int, message: object) -> object:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise RequestError(f"messages[{index}]={shortened(message)} cannot be used: it needs a role and a content")
    if message["role"] not in _ROLES:
        raise RequestError(f"messages[{index}] has role {message['role']!r}: give one of {', '.join(_ROLES)}")
    checked_text(message["content"], f"messages[{index}]: content")
    if message.get("token_ids") and message["role"] != "assistant":
        raise RequestError(f"messages[{index}] has token_ids: only what the assistant said was generated")
    return message["role"]


def _mark_start() -> str:
    return "\ue0d1"  # a private-use character, so templates leave it alone


def _mark(index: int) -> str:
    return f"{_mark_start()}{index}\ue0d2"


def _as_written(whole: str, position: int, content: str, following: str) -> str | None:
    """What stands for `content` at `position`: itself or its stripped form; None if it is neither."""
    for text in (content, content.strip()):
        if whole.startswith(text + following, position):
            return text
    return None
