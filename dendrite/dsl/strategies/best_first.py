"""Best-first search: the most promising open node of the whole tree goes next."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dendrite.dsl.strategies.base import Ask, Candidate, Expand, Expanded, ProgramFacts, Strategy, Told
from dendrite.dsl.strategies.common import best_of, check_counts, check_has_score
from dendrite.dsl.types import StepId


@dataclass(frozen=True, slots=True)
class BestFirstState:
    """Open nodes anywhere in the tree, and how many expansions were started and are awaited."""

    open: tuple[Candidate, ...]
    best: Candidate
    num_started: int = 0
    num_awaited: int = 0


class BestFirst(Strategy[BestFirstState]):
    """Expands the best open node anywhere in the tree, until a goal is found.

        dd.compile(step, value, strategy=dd.BestFirst(max_nodes=50))

    The best is the goal, else the highest value, deeper first where values are equal.

    Args:
        max_nodes: nodes expanded at most.
        parallel: nodes expanded at the same time, the best open ones.
    """

    def __init__(self, max_nodes: int, *, parallel: int = 1) -> None:
        self.max_nodes = max_nodes
        self.parallel = parallel

    def check(self, facts: ProgramFacts) -> None:
        """Refuse counts below 1, and a program without a score."""
        check_counts(self, max_nodes=self.max_nodes, parallel=self.parallel)
        check_has_score(self, facts, "to know which node is best")

    def begin(self, root: Candidate, seed: int = 0) -> BestFirstState:
        """The root is open; nothing is drawn."""
        del seed
        return BestFirstState(open=(root,), best=root)

    def ask(self, state: BestFirstState) -> tuple[BestFirstState, Sequence[Ask]]:
        """The best open nodes, as many as may be under way."""
        asks: list[Ask] = []
        while (
            state.open
            and not state.best.is_goal
            and state.num_awaited < self.parallel
            and state.num_started < self.max_nodes
        ):
            node = best_of(*state.open)
            asks.append(Expand(node.id))
            state = replace(
                state,
                open=tuple(other for other in state.open if other.id != node.id),
                num_started=state.num_started + 1,
                num_awaited=state.num_awaited + 1,
            )
        return state, asks

    def tell(self, state: BestFirstState, told: Told) -> BestFirstState:
        """Children are open unless they are ends."""
        assert isinstance(told, Expanded), "nothing else was asked"
        return replace(
            state,
            open=(*state.open, *(child for child in told.children if not child.is_terminal)),
            best=best_of(state.best, *told.children),
            num_awaited=state.num_awaited - 1,
        )

    def best(self, state: BestFirstState) -> StepId:
        """The goal, else the highest value seen."""
        return state.best.id

    def live(self, state: BestFirstState) -> Collection[StepId]:
        """The open nodes and the best."""
        return {state.best.id, *(node.id for node in state.open)}

    def __str__(self) -> str:
        return f"BestFirst({self.max_nodes}" + (f", parallel={self.parallel})" if self.parallel != 1 else ")")
