"""The tree operations that a program compiles to. The search loop executes this list; `explain()` prints it.

Open                    the root: the prompt as a user's turn
Loop(strategy)          asks for expansions and selections until it has enough
  Propose               what a node's children continue
  Append                the cue, once, on a fork of the node
  Fork                  one branch a child
  Generate              each child, in one batch with all that is under way
  Observe               parse, call tools; state, terminal, goal
  Merge                 drop what has the key of an earlier node
  Score                 a number, or a Choice read from the model
  Select                the survivors
  Release               prunes what the strategy let go of
Return                  the best path stays, the rest is pruned
"""

from __future__ import annotations

from dataclasses import dataclass

from dendrite.dsl.functions import Function
from dendrite.dsl.node import Sampling
from dendrite.dsl.strategies.base import Strategy
from dendrite.dsl.types import Prompt


@dataclass(frozen=True, slots=True)
class Open:
    """Root the search at the prompt, or fork the branch it continues."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One `@expand` of the program."""

    cue: Prompt
    """What children continue where there is no function."""
    function: Function | None
    when: Function | None
    width: int
    sampling: Sampling
    prior: float


@dataclass(frozen=True, slots=True)
class Propose:
    """Ask every source what a node's children continue."""

    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Append:
    """Fork the node once for every proposal and append its cue, so that siblings share the cue's K/V."""


@dataclass(frozen=True, slots=True)
class Fork:
    """One branch for every child of every proposal."""


@dataclass(frozen=True, slots=True)
class Generate:
    """Generate every child, in one batch with all that is under way; what is done first goes on first."""


@dataclass(frozen=True, slots=True)
class Observe:
    """Call the function once for a finished child, and append what it says."""

    function: Function
    concurrency: int | None


@dataclass(frozen=True, slots=True)
class Merge:
    """Drop each child whose key an earlier node has; earlier in the order asked, whatever is done first."""

    key: Function


@dataclass(frozen=True, slots=True)
class Score:
    """Add the function's score, times `weight`, to a child's value."""

    function: Function
    takes_many: bool
    """Whether it takes a sequence of nodes."""
    batch: int | None
    weight: float


@dataclass(frozen=True, slots=True)
class Select:
    """Order the candidates by value, let the function choose, keep the first `keep`."""

    function: Function | None
    keep: int | None


@dataclass(frozen=True, slots=True)
class Release:
    """Prune every branch that the strategy will not come back to."""


Expansion = Propose | Append | Fork | Generate | Observe | Merge | Score


@dataclass(frozen=True, slots=True)
class Loop:
    """Drive the strategy: expansions run `body`, choices run `select`, and `release` follows each."""

    strategy: Strategy
    body: tuple[Expansion, ...]
    select: Select
    release: Release
    vote: Function | None = None
    """What nodes vote for, where the strategy lets them."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The `@expand`s."""
        return next(operation.sources for operation in self.body if isinstance(operation, Propose))


@dataclass(frozen=True, slots=True)
class Return:
    """End with the strategy's best node: its path stays live, all else is pruned."""


Operation = Open | Loop | Return
Operations = tuple[Open, Loop, Return]
