"""A tokenizer of bytes whose ids also tell where a text began, so that a script knows where its reply did."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from dendrite.engine.messages import Message

OPENING = 256
"""From here on, a second copy of the 256 bytes: the first byte of each text that was encoded or said."""
SPECIAL = 512
NAMES = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
BEGIN, END = SPECIAL, SPECIAL + 1
VOCAB_SIZE = SPECIAL + len(NAMES)


class ByteTokenizer:
    """One token a byte; see `dendrite.engine.text.Tokenizer` for what the methods promise.

    encode("hi") is [OPENING + ord("h"), ord("i")], and so is a reply "hi".
    """

    vocab_size = VOCAB_SIZE
    eos_token_ids = frozenset({END})
    bos_token_id = BEGIN
    byte_token_ids: frozenset[int] = frozenset()
    chat_template = ""

    def encode(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Bytes of the text, the first one marked."""
        ids = [BEGIN] if bos else []
        pieces = re.split("|".join(f"({re.escape(name)})" for name in NAMES), text) if special else [text]
        for piece in filter(None, pieces):
            ids += [SPECIAL + NAMES.index(piece)] if special and piece in NAMES else _marked(piece)
        return ids

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """The bytes as text; what is no UTF-8 as replacement characters."""
        return b"".join(_bytes_of(token_ids, special=special)).decode(errors="replace")

    def render(
        self,
        messages: Sequence[Message],
        *,
        continue_last: bool = False,
        tools: Sequence[Mapping[str, object]] = (),  # noqa: ARG002 - its turns have no place for tools
    ) -> list[int]:
        """`<|begin|>`, then `<|role|>content<|end|>` for each message, then `<|assistant|>`."""
        ids = [BEGIN]
        for message in messages:
            ids += [_role(message["role"]), *(message.get("token_ids") or _marked(message["content"])), END]
        return ids[:-1] if continue_last else [*ids, _role("assistant")]


def _marked(text: str) -> list[int]:
    ids = list(text.encode())
    return [OPENING + ids[0], *ids[1:]] if ids else []


def _role(name: str) -> int:
    return SPECIAL + NAMES.index(f"<|{name}|>")


def _bytes_of(token_ids: Sequence[int], *, special: bool) -> Iterator[bytes]:
    for token_id in token_ids:
        if token_id < SPECIAL:
            yield bytes([token_id % 256])
        elif special:
            yield NAMES[token_id - SPECIAL].encode()
