"""What a search tells whoever watches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal

from dendrite.dsl.node import Node
from dendrite.dsl.types import S

if TYPE_CHECKING:  # a result holds nodes and events hold results
    from dendrite.dsl.result import Result

EventKind = Literal[
    "opened", "expanded", "rejected", "dropped", "observed", "scored", "goal", "frontier", "round", "pruned", "done"
]


@dataclass(frozen=True)
class Event(Generic[S]):
    """One thing that happened in a search.

        async for event in program.astream(engine, "Use 4 9 10 13 to make 24."):
            if event.kind == "scored":
                print(event.node.depth, event.node.value, event.node.text)

    Kinds, in the order they come in a round: `opened` (the root), `expanded` (a child was made), `observed`,
    `rejected` (by the user's `@observe`), `dropped` (a function failed on it, or the budget ended in one), `scored`,
    `goal`, `frontier` (`nodes` wait for the choice who goes on), `round` (`nodes` survived it, `node` is the best so
    far), `pruned`, and once at the end `done` (with the `result`, and the best node).
    """

    kind: EventKind
    node: Node[S]
    nodes: Sequence[Node[S]] = ()
    detail: str = ""
    """Why a node was rejected or dropped."""
    result: Result[S] | None = None
