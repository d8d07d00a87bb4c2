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
    "opened",
    "proposed",
    "forked",
    "expanded",
    "rejected",
    "merged",
    "dropped",
    "observed",
    "scored",
    "goal",
    "frontier",
    "round",
    "reflected",
    "voted",
    "told",
    "pruned",
    "done",
]


@dataclass(frozen=True)
class Event(Generic[S]):
    """One thing that happened in a search.

        async for event in program.astream(engine, "Use 4 9 10 13 to make 24."):
            if event.kind == "scored":
                print(event.node.depth, event.node.value, event.node.text)

    | kind | comes when |
    |---|---|
    | `opened` | the root is there |
    | `proposed` | `@expand` said what children of `node` continue: the cue, or a child's own text, in `detail` |
    | `forked` | a child has its branch |
    | `expanded` | a child's text is complete |
    | `rejected`, `merged`, `dropped` | `@observe` rejected it; an earlier node has its key; a function failed, or
      the budget ended. Why is in `detail` |
    | `observed`, `scored` | a child has its state; has its value |
    | `goal` | a goal was told to the strategy |
    | `frontier` | `nodes` wait for the choice who goes on |
    | `round` | `nodes` survived that choice; `node` is the best so far |
    | `reflected` | the model reflected on `node`: what it said is in `detail` |
    | `voted` | `nodes` have voted |
    | `told` | the strategy has taken in what came of an ask about `node`, and said what is asked next |
    | `pruned` | the search let go of a node |
    | `done` | once, at the end: with the `result`, and the best node |

    Children that are under way together tell of themselves as they go on; everything a strategy is told comes in the
    order it asked.
    """

    kind: EventKind
    node: Node[S]
    nodes: Sequence[Node[S]] = ()
    detail: str = ""
    """What there is to say, as the table has it."""
    result: Result[S] | None = None
