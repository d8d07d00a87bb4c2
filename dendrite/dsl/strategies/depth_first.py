"""Depth-first search over steps: Tree of Thoughts with backtracking (Yao et al., 2023, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dendrite.dsl.strategies.base import Ask, Candidate, Expand, Expanded, ProgramFacts, Strategy, Told
from dendrite.dsl.strategies.common import check_counts, check_has_score, check_tells_apart
from dendrite.dsl.types import StepId
from dendrite.engine.arguments import as_number
from dendrite.engine.errors import ProgramError


@dataclass(frozen=True, slots=True)
class DepthFirstState:
    """The nodes still to be tried, the next one last.

    root ─┬─ a (0.2)            stack   a, c, d        d is tried first, then c, then a
          └─ b (0.9) ─┬─ c (0.5)
                      └─ d (0.6)
    """

    stack: tuple[Candidate, ...]
    best: Candidate
    is_awaited: bool = False


class DepthFirst(Strategy[DepthFirstState]):
    """Goes deeper into the best child while its value is at least `threshold`, else back to the next best.

        dd.compile(step, value, strategy=dd.DepthFirst(depth=4, threshold=0.3))

    The search ends at the first goal, or when all that may be tried was tried; a `Budget` ends it earlier. The best is
    the goal, else the best end that was reached (terminal, or at full depth), else the highest value.

    Args:
        depth: steps of the longest path.
        threshold: children of lower value are not tried; None tries all, best first.
    """

    def __init__(self, depth: int, *, threshold: float | None = None) -> None:
        self.depth = depth
        self.threshold = threshold

    def check(self, facts: ProgramFacts) -> None:
        """Refuse a depth below 1, a threshold without a score, and a program that tells no node from another."""
        check_counts(self, depth=self.depth)
        check_tells_apart(self, facts)
        if self.threshold is not None:
            if as_number(self.threshold) is None or math.isnan(self.threshold):
                raise ProgramError(f"{self}: threshold={self.threshold!r} cannot be used: give a number, or None")
            check_has_score(self, facts, "to hold against the threshold")

    def begin(self, root: Candidate, seed: int = 0) -> DepthFirstState:
        """The root is tried first; nothing is drawn."""
        del seed
        return DepthFirstState(stack=(root,), best=root)

    def ask(self, state: DepthFirstState) -> tuple[DepthFirstState, Sequence[Ask]]:
        """The node on top of the stack."""
        if state.is_awaited or state.best.is_goal or not state.stack:
            return state, ()
        return replace(state, stack=state.stack[:-1], is_awaited=True), (Expand(state.stack[-1].id),)

    def tell(self, state: DepthFirstState, told: Told) -> DepthFirstState:
        """Children that are worth it go on the stack, the best on top."""
        assert isinstance(told, Expanded), "nothing else was asked"
        tried = [child for child in told.children if self._passes(child) and not self._is_end(child)]
        tried.sort(key=lambda child: (child.rank[0], -child.id))  # of equal ones the first made is on top
        best = max((state.best, *told.children), key=self._worth)
        return DepthFirstState(stack=(*state.stack, *tried), best=best)

    def _passes(self, node: Candidate) -> bool:
        return self.threshold is None or (node.value is not None and node.value >= self.threshold)

    def _is_end(self, node: Candidate) -> bool:
        return node.is_terminal or node.depth >= self.depth

    def _worth(self, node: Candidate) -> tuple[bool, bool, float, int]:
        value = -math.inf if node.value is None else node.value
        return (node.is_goal, self._is_end(node) and self._passes(node), value, node.depth)

    def best(self, state: DepthFirstState) -> StepId:
        """The goal, else the best end."""
        return state.best.id

    def live(self, state: DepthFirstState) -> Collection[StepId]:
        """What is still to be tried, and the best."""
        return {state.best.id, *(node.id for node in state.stack)}

    def __str__(self) -> str:
        threshold = "" if self.threshold is None else f", threshold={self.threshold}"
        return f"DepthFirst(depth={self.depth}{threshold})"
