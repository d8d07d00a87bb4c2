"""A tokenizer of bytes whose ids also tell where a text began, so that a script knows where its reply did."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from llguidance import LLTokenizer, TokenizerWrapper

from dendrite.engine.messages import Message

OPENING = 256
"""From here on, a second copy of the 256 bytes: the first byte of each text that was encoded or said."""
FORCED = 512
"""And a third: the first byte of a run that a grammar forced, which may begin a text or stand in the midst of one."""
SPECIAL = 768
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

    def for_grammars(self, vocab_size: int) -> LLTokenizer:
        """All copies of a byte are that byte to a grammar."""
        return LLTokenizer(TokenizerWrapper(_Vocabulary()), n_vocab=vocab_size)

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


class _Vocabulary:
    """What llguidance asks of a tokenizer of another make."""

    eos_token_id = END
    bos_token_id = BEGIN
    tokens = (*(bytes([token_id % 256]) for token_id in range(SPECIAL)), *(name.encode() for name in NAMES))
    special_token_ids = tuple(range(SPECIAL, VOCAB_SIZE))

    def __call__(self, text: bytes) -> list[int]:
        """Bytes of a text that a grammar forces, the first one marked."""
        return [FORCED + text[0], *text[1:]] if text else []


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
