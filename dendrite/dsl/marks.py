"""The decorators. They only mark: each attaches a frozen record and returns the same callable.

A marked function stays what it was, so it can be called in a unit test; a marked method carries its record on the
function, where every bound method finds it. What the records say is checked by `dd.compile`, not here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, overload

from dendrite.dsl.functions import Function
from dendrite.dsl.node import Node
from dendrite.dsl.types import F, Prompt, S
from dendrite.engine.errors import ProgramError

_ATTRIBUTE = "__dendrite__"


class Mark(Protocol):
    """A configured decorator: applied to a function, or a part of a program by itself."""

    def __call__(self, f: F, /) -> F:
        """Mark `f` and return it."""


class _Marking:
    """What the records share: being called with a function attaches them to it."""

    def __call__(self, f: F, /) -> F:
        if not callable(f):
            raise ProgramError(f"@{self} decorates a function, not {f!r}; its options are keywords")
        other = mark_of(f)
        if other is not None:
            raise ProgramError(f"{Function.of(f).place} is marked @{other} already: one function, one part")
        try:
            setattr(f, _ATTRIBUTE, self)
        except AttributeError:
            raise ProgramError(
                f"{f!r} cannot be marked: decorate the function where it is defined, or wrap it in one of your own"
            ) from None
        return f


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandMark(_Marking):
    """What `@expand` was told."""

    cue: Prompt | None = None
    width: int = 1
    max_tokens: int = 256
    stop: str | Sequence[str] = ()
    temperature: float = 1.0
    when: Callable[..., bool] | None = None
    prior: float = 1.0
    choices: Sequence[str] | None = None
    regex: str | None = None
    grammar: str | None = None
    schema: type | Mapping[str, object] | None = None
    line: str = field(default="", compare=False)
    """Where it was written, for messages about parts without a function."""

    def __str__(self) -> str:
        return "expand"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserveMark(_Marking):
    """What `@observe` was told."""

    concurrency: int | None = None

    def __str__(self) -> str:
        return "observe"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreMark(_Marking):
    """What `@score` was told."""

    batch: int | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        return "score"


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneMark(_Marking):
    """What `@prune` was told."""

    keep: int | None = None
    line: str = field(default="", compare=False)
    """As an `@expand`'s."""

    def __str__(self) -> str:
        return "prune"


AnyMark = ExpandMark | ObserveMark | ScoreMark | PruneMark


def mark_of(part: object) -> AnyMark | None:
    """The record that a decorator left on a function or a bound method, if one did."""
    mark = getattr(part, _ATTRIBUTE, None)
    return mark if isinstance(mark, AnyMark) else None


@overload
def expand(f: F, /) -> F: ...
@overload
def expand(
    *,
    cue: Prompt | None = None,
    width: int = 1,
    max_tokens: int = 256,
    stop: str | Sequence[str] = (),
    temperature: float = 1.0,
    when: Callable[[Node[S]], bool] | None = None,
    prior: float = 1.0,
    choices: Sequence[str] | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    schema: type | Mapping[str, object] | None = None,
) -> Mark: ...
def expand(
    f: Callable[..., object] | None = None,
    /,
    *,
    cue: Prompt | None = None,
    width: int = 1,
    max_tokens: int = 256,
    stop: str | Sequence[str] = (),
    temperature: float = 1.0,
    when: Callable[[Node[S]], bool] | None = None,
    prior: float = 1.0,
    choices: Sequence[str] | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    schema: type | Mapping[str, object] | None = None,
) -> Callable[..., object]:
    r"""Say what a node's children continue. A program may have several; they add up.

        @dd.expand(width=5, max_tokens=32, stop="\n")
        def step(node: dd.Node) -> str:          # a cue: text, or chat messages
            return "\nStep:"

        dd.expand(cue="\nStep:", width=5)        # a part by itself, where the cue is always the same

    The function, plain or async, takes a `Node` and returns a cue (`str` or messages), a `Gen`, or a list of `Child`ren
    that it made itself.

    Args:
        f: the function, where the decorator is used without options.
        cue: what the children continue, in place of a function.
        width: how many children are generated; a list of `Child`ren has its own length.
        max_tokens: most tokens of a child.
        stop: strings that end a child; not part of its text.
        temperature: of the children's generation; 0 makes them all alike.
        when: expand only the nodes it is true of.
        prior: how promising its children are beforehand; for strategies that weigh it.
        choices: texts, of which each child is one.
        regex: what each child's whole text matches. One of these four may be given, see `dd.Constraint`; it holds where
            the function returns no constrained `Gen` of its own.
        grammar: in Lark, what each child's text is parsed by.
        schema: a type that pydantic knows, or a JSON schema, that each child's text is JSON of.
    """
    mark = ExpandMark(
        cue=cue,
        width=width,
        max_tokens=max_tokens,
        stop=stop,
        temperature=temperature,
        when=when,
        prior=prior,
        choices=choices,
        regex=regex,
        grammar=grammar,
        schema=schema,
        line=_line_of_caller(),
    )
    return mark if f is None else mark(f)


@overload
def observe(f: F, /) -> F: ...
@overload
def observe(*, concurrency: int | None = None) -> Callable[[F], F]: ...
def observe(f: Callable[..., object] | None = None, /, *, concurrency: int | None = None) -> Callable[..., object]:
    r"""Look at every finished child once: parse it, call tools, give its state.

        @dd.observe(concurrency=4)
        async def use_tool(node: dd.Node[Trip]) -> dd.Outcome[Trip]:
            return dd.Outcome(node.state, append=f"\nObservation: {await call(node.text)}")

    The function, plain or async, takes the child, whose state is still its parent's (or what its `Child` gave), and
    returns the new state or an `Outcome`; `raise dd.Reject(why)` drops the child.

    Args:
        f: the function, where the decorator is used without options.
        concurrency: most calls of an async function at the same time; None is no limit.
    """
    mark = ObserveMark(concurrency=concurrency)
    return mark if f is None else mark(f)


@overload
def score(f: F, /) -> F: ...
@overload
def score(*, batch: int | None = None, weight: float = 1.0) -> Callable[[F], F]: ...
def score(
    f: Callable[..., object] | None = None, /, *, batch: int | None = None, weight: float = 1.0
) -> Callable[..., object]:
    r"""Say how good a node is. A program may have several; a node's value is their weighted sum.

        @dd.score
        def value(node: dd.Node) -> dd.Choice:
            return dd.Choice({"sure": 1.0, "maybe": 0.3, "no": 0.0}, "\nCan this reach 24?")

    The function, plain or async, takes a `Node` and returns a number, or a `Choice` that is read from the model. One
    that takes a `Sequence[Node]` returns as many numbers.

    Args:
        f: the function, where the decorator is used without options.
        batch: most nodes of one call of a function that takes a sequence; None gives it all there are.
        weight: what its score is multiplied by.
    """
    mark = ScoreMark(batch=batch, weight=weight)
    return mark if f is None else mark(f)


def reward(
    model: Callable[[list[str]], object], /, *, batch: int | None = None, weight: float = 1.0
) -> Callable[[Sequence[Node[S]]], object]:
    """A score of texts: any callable, plain or async, from transcripts to as many numbers, such as a reward model.

        program = dd.compile(step, dd.reward(prm, batch=16), strategy=dd.MCTS(64, parallel=8))

    Args:
        model: takes a list of transcripts; returns a list, an array or a tensor of numbers.
        batch: most texts of one call; None gives it all there are.
        weight: what its score is multiplied by.
    """

    def scored(nodes: Sequence[Node[S]]) -> object:
        return model([node.transcript for node in nodes])

    scored.__qualname__ = getattr(model, "__qualname__", type(model).__qualname__)  # what messages call it
    ScoreMark(batch=batch, weight=weight)(scored)
    return scored


@overload
def prune(f: F, /) -> F: ...
@overload
def prune(*, keep: int) -> Mark: ...
def prune(f: Callable[..., object] | None = None, /, *, keep: int | None = None) -> Callable[..., object]:
    """Say which nodes of a frontier go on.

        dd.prune(keep=3)                         # the three of highest value, over the whole frontier

        @dd.prune                                # or a function, plain or async: the survivors, best first
        async def human(nodes: Sequence[dd.Node]) -> Sequence[dd.Node]:
            return nodes[:1]

    Args:
        f: the function, where the decorator is used without options.
        keep: how many survive, of the whole frontier. On a function, `@dd.prune(keep=3)` cuts what it returns.
    """
    mark = PruneMark(keep=keep, line=_line_of_caller())
    return mark if f is None else mark(f)


def _line_of_caller() -> str:
    """Where a user's file calls the decorator."""
    frame = sys._getframe(2)  # noqa: SLF001 - this function's caller is the decorator
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
