"""What a strategy is: a pure function over a state of its own, asked what to do and told what came of it.

The search loop holds the state. It asks, does what was asked, all of it in one batch, and tells the results in the
order they were asked, each tell followed by the ask it frees. So timing never changes a search, and a state that is
made of plain values can be written down as JSON and gone on from.

    state = strategy.begin(root)
    state, asks = strategy.ask(state)        # [Expand(0)]
    state = strategy.tell(state, Expanded(0, children))
    state, asks = strategy.ask(state)        # [Select((1, 2, 3))]
    ...                                      # until nothing is asked and nothing is under way
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

from typing_extensions import TypeVar

from dendrite.dsl.types import Prompt, StepId

P = TypeVar("P", default=Any)
"""A strategy's state: frozen, made of plain values."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a strategy knows of a node."""

    id: StepId
    parent: StepId | None
    depth: int
    value: float | None = None
    """Higher is better; None where the program has no score."""
    prior: float = 1.0
    """What `@expand` and `Child` said of it beforehand."""
    logprob: float | None = None
    """Mean log-probability of its tokens; of a `Child`'s only for strategies that want it (`wants_logprobs`)."""
    is_terminal: bool = False
    """Not to be expanded."""
    is_goal: bool = False

    @property
    def rank(self) -> tuple[float, int]:
        """Sorts better nodes higher: by value, then by depth."""
        return (float("-inf") if self.value is None else self.value, self.depth)


@dataclass(frozen=True, slots=True)
class Expand:
    """Ask for children of a node: all that the program proposes, or `width` more of them.

    `width` of several proposals are drawn by their priors; a child that `@expand` made itself is drawn once at most.
    """

    node: StepId
    width: int | None = None


@dataclass(frozen=True, slots=True)
class Select:
    """Ask which of these go on; the program's `@prune` answers, else all do, best first."""

    nodes: tuple[StepId, ...]


@dataclass(frozen=True, slots=True)
class Reflect:
    """Ask the model about a node. The answer joins every later node's `reflections`, or stays in the node's text."""

    node: StepId
    prompt: Prompt
    is_kept: bool = False
    """Leave question and answer in the node's transcript, for what continues it."""


@dataclass(frozen=True, slots=True)
class Vote:
    """Ask what these nodes vote for."""

    nodes: tuple[StepId, ...]


Ask = Expand | Select | Reflect | Vote


@dataclass(frozen=True, slots=True)
class Expanded:
    """The children that an `Expand` brought, observed and scored, without those that were rejected."""

    node: StepId
    children: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Selected:
    """The survivors of a `Select`, best first."""

    nodes: tuple[StepId, ...]


@dataclass(frozen=True, slots=True)
class Reflected:
    """What the model said to a `Reflect`."""

    node: StepId
    text: str


@dataclass(frozen=True, slots=True)
class Voted:
    """The result of a `Vote`: nodes that vote for the same have the same number; None does not vote."""

    nodes: tuple[StepId, ...]
    ballots: tuple[int | None, ...]


Told = Expanded | Selected | Reflected | Voted


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramFacts:
    """What a strategy may check about the program it is compiled with."""

    has_score: bool
    has_observe: bool
    has_selector: bool
    """A `@prune` function, which picks without values."""
    keep: int | None


class Strategy(ABC, Generic[P]):
    """A search algorithm. Subclass it for one of your own; all methods are pure."""

    chooses_frontier: ClassVar[bool] = False
    """Whether it asks for each choice with `Select`; else `@prune` chooses among the children of every node."""
    wants_logprobs: bool = False
    """Whether `Candidate.logprob` is wanted of children that `@expand` made itself too: one pass more for each node."""
    vote: Callable[..., Hashable] | None = None
    """What nodes vote for, where the strategy asks for `Vote`s."""

    def check(self, facts: ProgramFacts) -> None:
        """Refuse a program that this strategy cannot run.

        Raises:
            ProgramError: says what is missing; raised out of `dd.compile`.
        """

    @abstractmethod
    def begin(self, root: Candidate, seed: int = 0) -> P:
        """The state before anything was asked; `seed` is for whatever the strategy draws."""

    @abstractmethod
    def ask(self, state: P) -> tuple[P, Sequence[Ask]]:
        """What to do next; nothing while results are awaited, or when the search is over."""

    @abstractmethod
    def tell(self, state: P, told: Told) -> P:
        """Take in the result of an ask."""

    @abstractmethod
    def best(self, state: P) -> StepId:
        """The node to return if the search ended now."""

    @abstractmethod
    def live(self, state: P) -> Collection[StepId]:
        """The nodes that may be expanded or returned later; the search lets go of all others but their ancestors."""

    @abstractmethod
    def __str__(self) -> str:
        """The strategy as a user would write it, for `explain()`."""
