"""Constraints compiled by llguidance for one engine's tokenizer, and where a text stands in one.

    Constraint ── grammar_of ──► llguidance's form ── compile ──► Guide at the start ── fork ──► one Guide a branch

A compiled grammar is kept, and a branch's `Guide` is a fork of it that costs microseconds.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from dendrite.engine.constraints import Constraint
from dendrite.engine.errors import ConstraintError

if TYPE_CHECKING:  # checking a grammar needs no tokenizer, and what compiles programs should not load them
    from dendrite.engine.text import Tokenizer

CAPACITY = 256
"""Compiled grammars that an engine keeps; those used longest ago go first."""
MAX_LENGTH = 1_000_000
"""Most characters of a constraint: beyond, llguidance takes minutes to compile or to refuse one."""


class Guide:
    """Where one text stands in its grammar. One thread at a time may use it; `fork` first to go two ways."""

    __slots__ = ("_matcher", "constraint")

    def __init__(self, constraint: Constraint, matcher: LLMatcher) -> None:
        self.constraint = constraint
        self._matcher = matcher

    @property
    def matcher(self) -> LLMatcher:
        """The state in llguidance, for computing masks."""
        return self._matcher

    def fork(self) -> Guide:
        """A guide at the same place that goes its own way; a few microseconds."""
        return Guide(self.constraint, self._matcher.deep_copy())

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take the next tokens of the text; ones that the grammar does not allow leave `error` set."""
        self._matcher.consume_tokens(list(token_ids))

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokenizer writes them; not taken yet, often none."""
        return self._matcher.compute_ff_tokens()

    @property
    def may_end(self) -> bool:
        """Whether the text so far matches the grammar."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether the text matches the grammar and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> ConstraintError | None:
        """Why the grammar cannot go on: it left no token, or it grew beyond llguidance's limits."""
        if not self._matcher.is_error():
            return None
        return ConstraintError(f"{self.constraint}: {_message(self._matcher)}")


class Grammars:
    """The compiled grammars of one engine. Thread-safe; compiling runs in the caller's thread, without the GIL."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._prepared: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Constraint, Guide] = OrderedDict()

    def __contains__(self, constraint: Constraint) -> bool:
        return constraint in self._compiled

    def guide(self, constraint: Constraint) -> Guide:
        """The constraint's start; fork it for each branch.

        Raises:
            ConstraintError: llguidance refuses the grammar, or it allows no text at all.
        """
        with self._lock:
            found = self._compiled.get(constraint)
            if found is not None:
                self._compiled.move_to_end(constraint)
                return found
        made = self._compile(constraint)
        with self._lock:
            self._compiled[constraint] = made
            while len(self._compiled) > CAPACITY:
                self._compiled.popitem(last=False)
        return made

    def _compile(self, constraint: Constraint) -> Guide:
        matcher = LLMatcher(self._vocabulary(), grammar_of(constraint), log_level=0, limits=_limits())
        if matcher.is_error():
            raise ConstraintError(f"{constraint} cannot be used: {_message(matcher)}")
        matcher.compute_bitmask()  # a grammar that allows nothing shows here, and what this computes serves all forks
        if matcher.is_error():
            raise ConstraintError(f"{constraint} cannot be used: it allows no text at all ({_message(matcher)})")
        return Guide(constraint, matcher)

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._prepared is None:  # a third of a second for 49,152 tokens, so not before it is needed
                self._prepared = self._tokenizer.for_grammars(self._vocab_size)
            return self._prepared


def check_grammar(constraint: Constraint) -> None:
    """Refuse what no engine could compile; needs no tokenizer, a millisecond.

    Raises:
        ConstraintError: with llguidance's message.
    """
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar_of(constraint), limits=_limits())
    if failed:
        raise ConstraintError(f"{constraint} cannot be used: {messages[0].strip()}")


def grammar_of(constraint: Constraint) -> str:
    """The constraint as llguidance takes it.

    Raises:
        ConstraintError: it is too long to be compiled in reasonable time.
    """
    if len(constraint.source) > MAX_LENGTH:
        raise ConstraintError(
            f"{constraint} cannot be used: it has {len(constraint.source)} characters of {MAX_LENGTH}"
        )
    match constraint.kind:
        case "schema":
            return LLMatcher.grammar_from_json_schema(
                constraint.source,
                # One way to write a value: a small model cannot lose itself in white space, and more tokens are forced.
                defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
            )
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.source)
        case "grammar":
            return LLMatcher.grammar_from_lark(constraint.source)
        case "choices":
            return LLMatcher.grammar_from_regex("|".join(map(_literal, json.loads(constraint.source))))


def _literal(text: str) -> str:
    """A regular expression for just this text."""
    return "".join(char if char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _limits() -> LLParserLimits:
    return LLParserLimits(verbose_errors=False)


def _message(matcher: LLMatcher) -> str:
    return matcher.get_error().partition("<state>")[0].strip() or matcher.stop_reason()
