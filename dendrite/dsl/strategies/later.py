"""Strategies that have their names and their arguments, and come with a later version: `dd.compile` says so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Generic, NoReturn

from dendrite.dsl.node import Node
from dendrite.dsl.strategies.base import Ask, Candidate, ProgramFacts, Strategy, Told
from dendrite.dsl.types import Prompt, S, StepId
from dendrite.engine.errors import ProgramError


class _Later(Strategy[None]):
    def check(self, facts: ProgramFacts) -> NoReturn:
        """Refuse every program."""
        del facts
        raise ProgramError(f"{self} comes with a later version: use Beam(depth=...) now, the program stays as it is")

    def begin(self, root: Candidate, seed: int = 0) -> None:
        raise NotImplementedError

    def ask(self, state: None) -> tuple[None, Sequence[Ask]]:
        raise NotImplementedError

    def tell(self, state: None, told: Told) -> None:
        raise NotImplementedError

    def best(self, state: None) -> StepId:
        raise NotImplementedError

    def live(self, state: None) -> Collection[StepId]:
        raise NotImplementedError

    def __str__(self) -> str:
        return type(self).__name__


class DepthFirst(_Later):
    """Depth-first Tree of Thoughts: go deeper while the value is at least `threshold`, else back. Comes later."""

    def __init__(self, depth: int, *, threshold: float | None = None) -> None:
        self.depth = depth
        self.threshold = threshold


class BestFirst(_Later):
    """Expand the best open node anywhere in the tree, `max_nodes` times at most. Comes later."""

    def __init__(self, max_nodes: int) -> None:
        self.max_nodes = max_nodes


class MCTS(_Later):
    """Monte Carlo tree search, `parallel` leaves at a time. Comes later."""

    def __init__(self, iterations: int, *, parallel: int = 1) -> None:
        self.iterations = iterations
        self.parallel = parallel


class LATS(_Later):
    """Language Agent Tree Search: MCTS that reflects on failures (Zhou et al., 2024). Comes later."""

    def __init__(self, iterations: int, *, reflect: Prompt = "\nWhat went wrong, and what to try instead?") -> None:
        self.iterations = iterations
        self.reflect = reflect


class SelfRefine(_Later):
    """Draft, criticise, revise, `rounds` times (Madaan et al., 2023). Comes later."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds


class BestOfN(_Later, Generic[S]):
    """The best of `n` independent paths, or what most of them `vote` for. Comes later."""

    def __init__(self, n: int, *, vote: Callable[[Node[S]], Hashable] | None = None) -> None:
        self.n = n
        self.vote = vote


class AdaptiveBranching(_Later):
    """Wider or deeper by Thompson sampling (AB-MCTS, Inoue et al., 2025). Comes later."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
