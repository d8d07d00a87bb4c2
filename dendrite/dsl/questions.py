"""What a `@score` will ask the model, as far as its source says: for `explain()`, before anything is run."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from dendrite.dsl.choice import Choice
from dendrite.dsl.functions import Function, plain
from dendrite.engine.errors import ProgramError

_CHARACTERS_A_TOKEN = 4
"""Of English in the vocabularies of today; an estimate is all that can be had before there is a tokenizer."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One `Choice(...)` in a function's source; None is what only a run can tell."""

    question: str | None
    labels: tuple[str, ...] | None
    is_fresh: bool

    @property
    def num_question_tokens(self) -> int | None:
        """About as many."""
        return None if self.question is None else tokens_in(self.question)

    @property
    def num_label_tokens(self) -> int | None:
        """About as many rows beside the question's: a label's last token is read, not run."""
        return None if self.labels is None else sum(tokens_in(f" {label}") - 1 for label in self.labels)


def tokens_in(text: str) -> int:
    """About how many, by length."""
    return -(-len(text) // _CHARACTERS_A_TOKEN)


def asked_by(function: Function) -> list[Asked]:
    """The choices that stand in the function's source, in their order; none where there is no source to read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(plain(function.call))))
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, built in, or a lambda cut out of its line
        return []
    return [_read(call) for call in _choices(tree)]


def _choices(tree: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == Choice.__name__:
            yield node


def _read(call: ast.Call) -> Asked:
    given = dict(zip(("labels", "question"), call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    question = _constant(given["question"]) if "question" in given else ""
    labels = _constant(given.get("labels"))
    try:
        known = None if labels is None else tuple(Choice(labels).labels)  # type: ignore[arg-type]  # it checks
    except (ProgramError, TypeError):
        known = None  # the run will say so
    is_fresh = bool(_constant(given.get("fresh")))
    return Asked(question if isinstance(question, str) else None, known, is_fresh)


def _constant(node: ast.expr | None) -> object:
    """The value of an expression of literals; None of any other."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
