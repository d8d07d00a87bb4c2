"""The text of a generation while its tokens come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from dendrite.engine.text import Tokenizer

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
