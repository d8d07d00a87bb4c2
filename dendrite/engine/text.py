"""Text to tokens and back, and the text of a generation while its tokens come in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

from jinja2 import TemplateError
from llguidance import LLTokenizer
from tokenizers import Tokenizer as Backend

from dendrite.engine.arguments import checked_text
from dendrite.engine.chat import check_messages, conversation_ids
from dendrite.engine.errors import ModelError, RequestError
from dendrite.engine.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer. All of it may be called from several threads at once."""

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 up to this, added tokens included."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens with which the model ends its text."""

    @property
    def bos_token_id(self) -> int | None:
        """The token a text starts with, if the model has one."""

    @property
    def byte_token_ids(self) -> frozenset[int]:
        """Tokens that stand for single bytes and are read together with their neighbours; none in most vocabularies."""

    def encode(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any string of whole characters.
            bos: `text` starts a sequence: add what the tokenizer adds there (BOS, a first space). Without it, `text`
                goes on from other text and stands as it is.
            special: read special tokens written out in `text` as such, rather than as plain characters.

        Raises:
            RequestError: `text` is no string, or holds half a surrogate pair.
        """

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `token_ids`; special tokens are left out unless `special`."""

    @property
    def chat_template(self) -> str:
        """The source of the model's chat template, to see what it can write; empty if there is none to read."""

    def render(
        self, messages: Sequence[Message], *, continue_last: bool = False, tools: Sequence[Mapping[str, object]] = ()
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant is to speak.

        Args:
            messages: at least one. Turns with `token_ids` keep them.
            continue_last: leave the last message open, to be continued, rather than start a new turn.
            tools: functions in OpenAI's form, for templates that write them.

        Raises:
            RequestError: a message without a known role or without text, or an order the template refuses.
            ModelError: the model has no chat template.
        """

    def for_grammars(self, vocab_size: int) -> LLTokenizer:
        """The vocabulary as llguidance takes it, with as many tokens as the model has logits; slow, ask once."""


class HFTokenizer:
    """`Tokenizer` over the Rust backend of a Transformers tokenizer, without the wrapper's overhead."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Iterable[int]) -> None:
        """Take copies of the backend of `tokenizer`, which may go on changing its own.

        Raises:
            ModelError: it has none.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise ModelError(
                f"{type(tokenizer).__name__} has no Rust backend (the `tokenizers` library): convert it to a "
                "tokenizer.json and load the folder again"
            )
        self._tokenizer = tokenizer
        description = _description(backend)
        inner = _without_first_space(description)
        whole_json = json.dumps(description)
        self._json = {True: whole_json, False: whole_json if inner == description else json.dumps(inner)}
        # `encode_special_tokens` is a switch on the backend itself, so each way to encode has a copy of its own
        # that never changes once it is made: (starts a sequence, reads special tokens) -> copy.
        self._backends: dict[tuple[bool, bool], Backend] = {}
        self._backend = self._variant(starts=True, special=True)
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = frozenset(eos_token_ids)
        bos = tokenizer.bos_token_id
        self.bos_token_id = bos if isinstance(bos, int) else None
        self.byte_token_ids = _byte_token_ids(self._backend, description)

    def encode(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        return _encoded(self._variant(starts=bos, special=special), text, bos=bos)

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """See `Tokenizer.decode`."""
        return self._backend.decode(token_ids, skip_special_tokens=not special)

    @property
    def chat_template(self) -> str:
        """See `Tokenizer.chat_template`."""
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError:
            return ""

    def render(
        self, messages: Sequence[Message], *, continue_last: bool = False, tools: Sequence[Mapping[str, object]] = ()
    ) -> list[int]:
        """See `Tokenizer.render`; special tokens are read in all of the rendered text, as the template needs it."""
        check_messages(messages, continue_last=continue_last)
        if not self.chat_template:
            raise ModelError(
                f"{self._tokenizer.name_or_path or 'this model'} has no chat template: give its prompt as text, or "
                "load a model that was tuned for chat"
            )

        def write(turns: Sequence[Mapping[str, object]]) -> str:
            text = self._tokenizer.apply_chat_template(
                cast("list[dict[str, str]]", [dict(turn) for turn in turns]),  # calls are lists, whatever it says
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=not continue_last,
                continue_final_message=continue_last,
            )
            return str(text)

        def encode(text: str, starts: bool) -> list[int]:  # noqa: FBT001 - as `chat.Encode` has it
            # The template writes BOS itself where the model wants one, so the tokenizer adds nothing.
            return _encoded(self._variant(starts=starts, special=True), text, bos=False)

        try:
            return conversation_ids(messages, write, encode)
        except RequestError:
            raise
        except (TemplateError, ValueError) as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error

    def for_grammars(self, vocab_size: int) -> LLTokenizer:
        """See `Tokenizer.for_grammars`; texts go on from other text, so no space is put before them."""
        return LLTokenizer(self._json[False], n_vocab=vocab_size, eos_token=sorted(self.eos_token_ids) or None)

    def _variant(self, *, starts: bool, special: bool) -> Backend:
        starts = starts or self._json[True] is self._json[False]
        found = self._backends.get((starts, special))
        if found is None:
            found = Backend.from_str(self._json[starts])
            found.encode_special_tokens = not special
            # Two threads may both have made one; either serves.
            self._backends[starts, special] = found
        return found


def _encoded(backend: Backend, text: str, *, bos: bool) -> list[int]:
    try:
        return backend.encode(text, add_special_tokens=bos).ids
    except TypeError:  # all that the library says is that it wants a `str`
        checked_text(text, "text")
        raise


def _description(backend: Backend) -> dict[str, object]:
    description: dict[str, object] = json.loads(backend.to_str())
    # Some models' files carry these; they would cut or fill up texts without a word.
    return {**description, "truncation": None, "padding": None}


_PLAIN_START: dict[str, object] = {"add_prefix_space": False, "prepend_scheme": "never"}
"""Options of the ByteLevel and the Metaspace component that put no space before a text."""


def _without_first_space(description: Mapping[str, object]) -> dict[str, object]:
    """The same tokenizer for text that goes on from other text: no space is put before it."""
    parts = ("normalizer", "pre_tokenizer")
    return {**description, **{part: _plain_start(description[part]) for part in parts}}


def _plain_start(component: object) -> object:
    if not isinstance(component, dict):
        return component
    if component["type"] == "Prepend":
        return None
    changed = {name: _PLAIN_START[name] for name in _PLAIN_START if name in component}
    for name, members in component.items():
        if isinstance(members, list) and component["type"] == "Sequence":
            changed[name] = [kept for member in members if (kept := _plain_start(member)) is not None]
    return {**component, **changed}


def _byte_token_ids(backend: Backend, description: Mapping[str, object]) -> frozenset[int]:
    if '"ByteFallback"' not in json.dumps(description["decoder"]):
        return frozenset()
    token_ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token_id for token_id in token_ids if token_id is not None)


_HALF = "\ufffd"
"""What a decoder shows for bytes that are no whole character, or not yet."""
_LONGEST_OPEN = 64
"""Tokens that may wait for the rest of a character or of a run of bytes before they are taken as they stand."""
CONTEXT_TOKENS = 2 * _LONGEST_OPEN
"""Of the tokens before a generation, as many of the last as its text may depend on."""
_LONGEST_CHARACTER = 4
"""Most tokens that one character can take: its bytes in UTF-8."""


class TextStream:
    """The text of one generation, token by token, with stop strings.

    Tokens are decoded once, in the company of the few before them, and settle when no later token can change them:

        context … | prefix | pending            prefix: decoded before, gives `pending` its surroundings
                             ▲ settled text ends here; a half character or a run of byte tokens waits

    A generation ends at the first token that completes any of the stop strings; where one token completes several,
    the text is cut before the one that starts first.
    """

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int], stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._overlap = max(map(len, stop), default=1) - 1
        self._prefix: list[int] = []
        self._prefix_text = ""
        self._next_prefix: Callable[[], tuple[list[int], str]] | None = partial(_last_readable, tokenizer, context_ids)
        self._pending: list[int] = []
        self._in_byte_run = False
        self._settled = ""
        self._open = ""
        """Text of `pending`: it may end in half a character, and in a byte run all of it may be undone."""
        self._whole = ""
        """The last `open` that ended in a whole character."""
        self._num_tokens = 0
        self._num_searched = 0
        self._marks = [(0, 0)]
        """(tokens, characters) after which the generation can be cut: the characters are the text of the tokens."""
        self._end: int | None = None
        self._num_taken = 0
        self._finished = False

    @property
    def text(self) -> str:
        """The text so far, cut before the stop string once there is one; half characters only after `finish`."""
        return self._visible[: self._end]

    def get_ready(self) -> None:
        """Decode what the next token is read behind, which `push` does otherwise: there is time while it is drawn."""
        if self._next_prefix is not None:
            self._prefix, self._prefix_text = self._next_prefix()
            self._next_prefix = None

    def push(self, token_id: int) -> bool:
        """Take the next token; True when it completes a stop string, after which no more tokens are taken."""
        assert self._end is None
        assert not self._finished
        self.get_ready()
        self._pending.append(token_id)
        self._num_tokens += 1
        window = self._tokenizer.decode(self._prefix + self._pending)
        text = window[_common_length(self._prefix_text, window) :]
        self._replace_open(text, token_id)
        self._find_stop()
        self._settle(window)
        return self._end is not None

    def take(self) -> str:
        """The text that became safe to show since the last call.

        A half character, a run of byte tokens that may yet turn out to be no text, and what may be the beginning of a
        stop string are kept back; after a stop or `finish` this gives all the rest.
        """
        if self._end is None and not self._finished:
            safe = min(len(self._settled), len(self._visible) - self._num_maybe_stop())
        else:
            safe = len(self.text)
        new = self._visible[self._num_taken : safe]
        self._num_taken = max(self._num_taken, safe)
        return new

    def finish(self) -> None:
        """No more tokens come: what was kept back is text after all."""
        self._finished = True

    def keep(self) -> tuple[int, str]:
        """How to cut the generation at its stop: (whole tokens to keep, characters to append as text after them).

        The text of the context and the kept tokens, and those characters, are together the context's and `text`.
        """
        if self._end is None:
            return self._num_tokens, ""
        num_tokens, length = next(mark for mark in reversed(self._marks) if mark[1] <= self._end)
        return num_tokens, self._visible[length : self._end]

    @property
    def _visible(self) -> str:
        return self._settled + (self._open if self._finished else self._open.rstrip(_HALF))

    def _replace_open(self, text: str, token_id: int) -> None:
        """Put `text` in the place of what the pending tokens said before the last one, `token_id`, came."""
        self._num_searched = min(self._num_searched, len(self._settled) + _common_length(self._open, text))
        if token_id in self._tokenizer.byte_token_ids:
            self._in_byte_run = True
        elif text != self._open:
            # A token without text of its own, a special one, lets the run go on behind it.
            self._in_byte_run = False
        self._open = text
        if not text.endswith(_HALF):
            unchanged = len(self._settled) + _common_length(self._whole, text)
            while self._marks[-1][1] > unchanged:
                self._marks.pop()
            self._marks.append((self._num_tokens, len(self._settled) + len(text)))
            self._whole = text

    def _find_stop(self) -> None:
        if not self._stop:
            return
        start = max(0, self._num_searched - self._overlap)
        visible = self._settled[start:] + self._open.rstrip(_HALF)[max(0, start - len(self._settled)) :]
        places = [place for stop in self._stop if (place := visible.find(stop)) >= 0]
        self._num_searched = start + len(visible)
        if places:
            self._end = start + min(places)

    def _settle(self, window: str) -> None:
        if not self._open.endswith(_HALF) and not self._in_byte_run:
            self._advance(len(self._pending), self._open)
        elif len(self._pending) > _LONGEST_OPEN:
            self._settle_regardless(window)

    def _settle_regardless(self, window: str) -> None:
        """Settle most of a backlog: up to the last whole character, or, where there is none, what is broken anyway."""
        num_pending = len(self._pending)
        for num_tokens in range(num_pending, num_pending - 1 - _LONGEST_CHARACTER, -1):
            text = self._tokenizer.decode(self._prefix + self._pending[:num_tokens])
            if text.startswith(self._prefix_text) and not text.endswith(_HALF):
                # The run begins anew behind the same prefix: the half character after it does not spoil what is shown.
                self._advance(num_tokens, text[len(self._prefix_text) :], move_prefix=not self._prefix_text)
                return
        for num_tokens in range(num_pending - _LONGEST_CHARACTER, 0, -1):
            text = self._tokenizer.decode(self._prefix + self._pending[:num_tokens])
            if window.startswith(text) and text.startswith(self._prefix_text):
                self._advance(num_tokens, text[len(self._prefix_text) :])
                return

    def _advance(self, num_tokens: int, text: str, *, move_prefix: bool = True) -> None:
        """Settle the first pending tokens, whose text is `text`; they become the prefix."""
        settled, self._pending = self._pending[:num_tokens], self._pending[num_tokens:]
        self._settled += text
        if move_prefix and (text or not self._prefix_text):
            self._next_prefix = partial(_moved_prefix, self._tokenizer, self._prefix, settled)
        self._open = self._whole = ""
        if self._pending:
            self.get_ready()
            window = self._tokenizer.decode(self._prefix + self._pending)
            self._open = window[_common_length(self._prefix_text, window) :]

    def _num_maybe_stop(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        tail = self._visible[-self._overlap :] if self._overlap else ""
        lengths = (
            n for stop in self._stop for n in range(min(len(stop) - 1, len(tail)), 0, -1) if tail.endswith(stop[:n])
        )
        return max(lengths, default=0)


def _common_length(first: str, second: str) -> int:
    if second.startswith(first):
        return len(first)
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))


def _moved_prefix(tokenizer: Tokenizer, prefix: list[int], token_ids: list[int]) -> tuple[list[int], str]:
    """Tokens that settled behind a prefix and are the next one; and their text."""
    text = tokenizer.decode(token_ids)
    if not text:
        # A first space, which decoders drop, or special tokens: alone they give no surroundings to what follows.
        token_ids = (prefix + token_ids)[-_LONGEST_OPEN:]
        text = tokenizer.decode(token_ids)
    return token_ids, text


def _last_readable(tokenizer: Tokenizer, token_ids: Sequence[int]) -> tuple[list[int], str]:
    """Enough of the last tokens to decode what follows as if all of them stood before it; and their text."""
    start = max(0, len(token_ids) - 2 * _LONGEST_CHARACTER)
    text = tokenizer.decode(token_ids[start:])
    while start and (token_ids[start] in tokenizer.byte_token_ids or not text):
        start = max(0, start - _LONGEST_CHARACTER)
        text = tokenizer.decode(token_ids[start:])
    return list(token_ids[start:]), text
