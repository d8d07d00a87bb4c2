"""Language Agent Tree Search (Zhou et al., 2024): Monte Carlo tree search that learns from failures in words."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dendrite.dsl.strategies.base import (
    Ask,
    Candidate,
    Expanded,
    ProgramFacts,
    Reflect,
    Reflected,
    Strategy,
    Told,
)
from dendrite.dsl.strategies.mcts import MCTS, MCTSState
from dendrite.dsl.types import Prompt, StepId, is_prompt
from dendrite.engine.errors import ProgramError


@dataclass(frozen=True, slots=True)
class LATSState:
    """The search, and the failures that are still to be thought about."""

    search: MCTSState
    failures: tuple[StepId, ...] = ()
    num_reflecting: int = 0


class LATS(Strategy[LATSState]):
    r"""Monte Carlo tree search that reflects on failures.

        dd.compile(act, use_tool, judge, strategy=dd.LATS(30, reflect="\nWhat went wrong?"))

    Where an expansion ends in terminal nodes and none is a goal, the model is asked `reflect` about the best of them.
    What it says is in `node.reflections` of all that is expanded afterwards, newest last (at most three); it enters the
    search's own text only where a program puts it there.

    Args:
        iterations: leaves expanded at most.
        reflect: what the model is asked about a failure.
        parallel: leaves under way at the same time; they wait while the model reflects.
        exploration: as for `MCTS`.
        depth: steps of the longest path; None has no limit.
    """

    def __init__(
        self,
        iterations: int,
        *,
        reflect: Prompt = "\nWhat went wrong, and what to try instead?",
        parallel: int = 1,
        exploration: float = 1.0,
        depth: int | None = None,
    ) -> None:
        self.search = MCTS(iterations, parallel=parallel, exploration=exploration, depth=depth)
        self.reflect = reflect

    def check(self, facts: ProgramFacts) -> None:
        """Refuse what `MCTS` refuses, an empty question, and a program in which nothing can fail."""
        self.search.check(facts)
        if not (self.reflect and is_prompt(self.reflect)):
            raise ProgramError(f"{self} asks nothing about failures: give reflect=, or use MCTS")
        if not facts.has_observe:
            raise ProgramError(f"{self} needs an @observe that says what is terminal: without one nothing ever fails")

    def begin(self, root: Candidate, seed: int = 0) -> LATSState:
        """Nothing has failed yet."""
        return LATSState(self.search.begin(root, seed))

    def ask(self, state: LATSState) -> tuple[LATSState, Sequence[Ask]]:
        """Reflections first; new leaves when they were told, so that all see them."""
        if state.failures and not state.search.best.is_goal:
            asks = [Reflect(node, self.reflect) for node in state.failures]
            return replace(state, failures=(), num_reflecting=state.num_reflecting + len(asks)), asks
        if state.num_reflecting:
            return state, ()
        search, more = self.search.ask(state.search)
        return replace(state, search=search), more

    def tell(self, state: LATSState, told: Told) -> LATSState:
        """Remember the best of what failed."""
        if isinstance(told, Reflected):
            return replace(state, num_reflecting=state.num_reflecting - 1)
        assert isinstance(told, Expanded), "nothing else was asked"
        state = replace(state, search=self.search.tell(state.search, told))
        ends = [child for child in told.children if child.is_terminal]
        if not ends or any(child.is_goal for child in ends):
            return state
        return replace(state, failures=(*state.failures, max(ends, key=lambda node: node.rank).id))

    def best(self, state: LATSState) -> StepId:
        """The goal, else the highest value seen."""
        return self.search.best(state.search)

    def live(self, state: LATSState) -> Collection[StepId]:
        """As for `MCTS`, and what is still to be thought about."""
        return {*self.search.live(state.search), *state.failures}

    def __str__(self) -> str:
        inner = str(self.search).removeprefix("MCTS(").removesuffix(")")
        return f"LATS({inner}, reflect={self.reflect!r})"
