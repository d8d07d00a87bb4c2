"""Text to tokens and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
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
