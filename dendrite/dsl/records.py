"""What the functions of a program return, and what limits a run: frozen records, read by the search loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Generic

from dendrite.dsl.types import Prompt, S
from dendrite.engine.arguments import as_number, is_whole, shortened
from dendrite.engine.constraints import Constraint, constraint_of
from dendrite.engine.errors import ProgramError


@dataclass(frozen=True)
class Gen:
    r"""What a child continues, returned by `@expand`: a cue, then generated text.

        @dd.expand(width=5, stop="\n")
        def step(node: dd.Node) -> dd.Gen:
            return dd.Gen("\nStep:", max_tokens=32)

    One of `choices`, `regex`, `grammar` and `schema` constrains the text, as `dd.Constraint` says; it goes before what
    the decorator says. An empty list of choices makes no child: there is no legal move here.

        @dd.expand(width=5)
        def move(node: dd.Node[Game]) -> dd.Gen:
            return dd.Gen("\nStep: ", choices=legal(node.state))
    """

    cue: Prompt = ""
    _: KW_ONLY
    max_tokens: int | None = None
    """Most tokens of the child; None takes what the decorator says."""
    choices: Sequence[str] | None = None
    regex: str | None = None
    grammar: str | None = None
    schema: type | Mapping[str, object] | None = None

    @property
    def constraint(self) -> Constraint | None:
        """What the text must match, if anything.

        Raises:
            ConstraintError: several were given, or one that says nothing.
        """
        return constraint_of(schema=self.schema, regex=self.regex, grammar=self.grammar, choices=self.choices)


@dataclass(frozen=True)
class Child(Generic[S]):
    r"""A child that `@expand` made itself: its text is appended as it stands, nothing is generated.

    Example:
        @dd.expand
        def moves(node: dd.Node[Game]) -> list[dd.Child[Game]]:
            return [dd.Child(f"\n{move}", play(node.state, move)) for move in legal(node.state)]
    """

    text: str
    state: S
    prior: float = 1.0
    """How promising the child is before it was looked at; for strategies that weigh it."""


@dataclass(frozen=True)
class Outcome(Generic[S]):
    """What `@observe` saw in a finished child.

    Example:
        @dd.observe
        def apply(node: dd.Node[Game]) -> dd.Outcome[Game]:
            now = play(node.state, node.text)
            return dd.Outcome(now, goal=now.left == (24,), terminal=len(now.left) == 1)
    """

    state: S
    append: Prompt = ""
    """Text or messages to put after the child, such as what a tool returned."""
    terminal: bool = False
    """Never expanded; may still be the best."""
    goal: bool = False
    """What was looked for: ends the search."""


class Reject(Exception):
    """Raised by `@observe` to drop a child: `raise dd.Reject("not a legal move")`."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of one run. When one is met the run ends with what it has and `result.stopped == "budget"`."""

    tokens: int | None = None
    """Most tokens generated, by steps and by `Node.ask` together; never exceeded."""
    nodes: int | None = None
    """Most nodes made, the root aside; never exceeded."""
    seconds: float | None = None
    """Wall-clock time; what is being generated when it ends is cancelled."""
    kv_bytes: int | None = None
    """Most bytes of K/V that the search may hold, checked between its operations."""
    branches: int | None = None
    """Most nodes whose branches are live at once, the root's among them; never exceeded. Temporary branches, such as
    those of questions, do not count. A search that asks for one more ends, even if others were about to be pruned."""

    def __post_init__(self) -> None:
        for name in ("tokens", "nodes", "seconds", "kv_bytes", "branches"):
            limit = getattr(self, name)
            if limit is None:
                continue
            number = as_number(limit)
            if number is None or (name != "seconds" and not is_whole(limit)):
                kind = "number" if name == "seconds" else "whole number"
                raise ProgramError(f"Budget({name}={shortened(limit)}) is no {kind}: give one above 0, or None")
            if not number > 0:
                raise ProgramError(f"Budget({name}={limit!r}) allows nothing: give a number above 0, or None")
