"""Beam search over steps: breadth-first Tree of Thoughts (Yao et al., 2023)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dendrite.dsl.strategies.base import (
    Ask,
    Candidate,
    Expand,
    Expanded,
    ProgramFacts,
    Select,
    Selected,
    Strategy,
    Told,
)
from dendrite.dsl.strategies.common import check_counts
from dendrite.dsl.types import StepId
from dendrite.engine.errors import ProgramError


@dataclass(frozen=True, slots=True)
class BeamState:
    """One round: the frontier is expanded, its children are gathered, the survivors become the frontier.

    frontier   a ─┬─ c          children   c, d, e
               b ─┼─ d          ended      what was terminal, of any round
                  └─ e          fallback   the best of the last frontier, should no child be left
    """

    frontier: tuple[Candidate, ...]
    """Best first."""
    fallback: Candidate
    children: tuple[Candidate, ...] = ()
    """Of this round, in the order asked; neither terminal nor goal."""
    ended: tuple[Candidate, ...] = ()
    """The best terminal node so far; none or one."""
    goal: Candidate | None = None
    num_rounds: int = 0
    num_awaited: int = 0
    """Asks that were not told yet."""
    is_expanded: bool = False
    """Whether the frontier's children were asked for in this round."""


class Beam(Strategy[BeamState]):
    """Each round expands every node of the frontier and keeps the best of all their children.

        dd.compile(step, value, dd.prune(keep=3), strategy=dd.Beam(depth=3))

    Without a `@prune` every child is kept: breadth-first search. A terminal node is expanded no more but may be the
    best; the first goal, in the order asked, ends the search. The best is the goal, else the highest value among the
    last frontier and the terminal nodes, deeper first where values are equal.

    Args:
        depth: rounds at most, so the steps of the longest path.
    """

    chooses_frontier = True

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def check(self, facts: ProgramFacts) -> None:
        """Refuse a depth below 1, and a program in which nothing tells one node from another."""
        check_counts(self, depth=self.depth)
        if facts.keep is not None and not (facts.has_score or facts.has_selector):
            raise ProgramError(f"Beam with prune(keep={facts.keep}) needs a @score to know which {facts.keep} to keep")
        if not (facts.has_score or facts.has_selector or facts.has_observe):
            raise ProgramError(
                "Beam has nothing to tell nodes apart by: "
                "add a @score, a @prune function, or an @observe that finds goals"
            )

    def begin(self, root: Candidate, seed: int = 0) -> BeamState:
        """The root is the first frontier; nothing is drawn."""
        del seed
        return BeamState(frontier=(root,), fallback=root)

    def ask(self, state: BeamState) -> tuple[BeamState, Sequence[Ask]]:
        """The whole frontier at once; when all of it was told, the choice among the children."""
        if state.num_awaited or state.goal or not state.frontier or state.num_rounds == self.depth:
            return state, ()
        asks: list[Ask] = []
        if not state.is_expanded:
            asks = [Expand(node.id) for node in state.frontier]
        elif state.children:
            asks = [Select(tuple(child.id for child in state.children))]
        else:
            return replace(state, frontier=()), ()
        return replace(state, num_awaited=len(asks), is_expanded=True), asks

    def tell(self, state: BeamState, told: Told) -> BeamState:
        """Gather children, or start the next round with the survivors."""
        state = replace(state, num_awaited=state.num_awaited - 1)
        if isinstance(told, Expanded):
            return _gathered(state, told.children)
        assert isinstance(told, Selected), "nothing else was asked"
        by_id = {child.id: child for child in state.children}
        frontier = tuple(by_id[node] for node in told.nodes)
        fallback = max((*frontier, *state.children), key=lambda node: node.rank) if not frontier else frontier[0]
        return replace(
            state,
            frontier=frontier,
            fallback=fallback,
            children=(),
            num_rounds=state.num_rounds + 1,
            is_expanded=False,
        )

    def best(self, state: BeamState) -> StepId:
        """The goal, else the best of what the search stands on."""
        if state.goal is not None:
            return state.goal.id
        pool = (*(state.children or state.frontier), *state.ended) or (state.fallback,)
        return max(pool, key=lambda node: node.rank).id

    def live(self, state: BeamState) -> Collection[StepId]:
        """The frontier, its children, and what may be returned."""
        if state.goal is not None:
            return {state.goal.id}
        return {node.id for node in (*state.frontier, *state.children, *state.ended, state.fallback)}

    def __str__(self) -> str:
        return f"Beam(depth={self.depth})"


def _gathered(state: BeamState, children: Sequence[Candidate]) -> BeamState:
    goal = state.goal or next((child for child in children if child.is_goal), None)
    ended = (*state.ended, *(child for child in children if child.is_terminal))
    return replace(
        state,
        goal=goal,
        ended=(max(ended, key=lambda node: node.rank),) if ended else (),
        children=(*state.children, *(child for child in children if not child.is_terminal)),
    )
