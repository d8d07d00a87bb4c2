"""Wider or deeper by Thompson sampling: AB-MCTS with node aggregation (Inoue et al., 2025, arXiv 2503.04412)."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from dendrite.dsl.strategies.base import Ask, Candidate, Expand, Expanded, ProgramFacts, Strategy, Told
from dendrite.dsl.strategies.common import best_of, check_counts, check_has_score
from dendrite.dsl.types import StepId

_KAPPA, _NU, _TAU_SQUARE = 1.0, 1.0, 0.1  # of the prior, with mean 0, as in the paper's own code


@dataclass(frozen=True, slots=True)
class Sums:
    """What a Gaussian is fitted to."""

    num: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> Sums:
        """With one value more."""
        return Sums(self.num + 1, self.total + value, self.squares + value * value)

    def without(self, other: Sums) -> Sums:
        """With fewer."""
        return Sums(self.num - other.num, self.total - other.total, self.squares - other.squares)


@dataclass(frozen=True, slots=True)
class Grown:
    """A node, and the values seen below it."""

    node: Candidate
    children: tuple[StepId, ...] = ()
    direct: Sums = Sums()
    """Of its children."""
    below: Sums = Sums()
    """Of all its descendants."""
    num_failed: int = 0
    """How often in a row it was asked for a child and had none: all were made already, or the last were rejected."""

    @property
    def is_dry(self) -> bool:
        """Whether to ask no more."""
        return self.num_failed >= 3


@dataclass(frozen=True, slots=True)
class AdaptiveBranchingState:
    """The tree, the range of values seen, and the numbers that key what is drawn."""

    tree: Mapping[StepId, Grown]
    best: Candidate
    seed: int
    low: float = 0.0
    high: float = 0.0
    num_started: int = 0
    num_awaited: int = 0


class AdaptiveBranching(Strategy[AdaptiveBranchingState]):
    """Decides at every node whether to try a new child or to go on below an old one, by Thompson sampling.

        dd.compile(answer, grade, strategy=dd.AdaptiveBranching(60, parallel=4))

    One child is made at a time. From the root down, a value is drawn for "a new child" from a posterior over the values
    of the children there, and one for "an old child" from a posterior over all that was found below them; if the
    old ones win, a child is drawn by what was found below it. Values are looked at as 0 to 1 within the range
    seen. `width` of the program counts for nothing here. The best is the goal, else the highest value, deeper
    first where equal.

    Args:
        iterations: children made at most.
        parallel: children under way at the same time.
        depth: steps of the longest path; None has no limit.
    """

    def __init__(self, iterations: int, *, parallel: int = 1, depth: int | None = None) -> None:
        self.iterations = iterations
        self.parallel = parallel
        self.depth = depth

    def check(self, facts: ProgramFacts) -> None:
        """Refuse counts below 1, and a program without a score."""
        check_counts(self, iterations=self.iterations, parallel=self.parallel)
        if self.depth is not None:
            check_counts(self, depth=self.depth)
        check_has_score(self, facts, "to learn from")

    def begin(self, root: Candidate, seed: int = 0) -> AdaptiveBranchingState:
        """A tree of the root alone."""
        return AdaptiveBranchingState({root.id: Grown(root)}, best=root, seed=seed)

    def ask(self, state: AdaptiveBranchingState) -> tuple[AdaptiveBranchingState, Sequence[Ask]]:
        """One child each of the nodes that sampling comes to."""
        asks: list[Ask] = []
        while not state.best.is_goal and state.num_awaited < self.parallel and state.num_started < self.iterations:
            node = self._descend(state)
            if node is None:
                break
            asks.append(Expand(node, width=1))
            state = replace(state, num_started=state.num_started + 1, num_awaited=state.num_awaited + 1)
        return state, asks

    def _descend(self, state: AdaptiveBranchingState) -> StepId | None:
        dice = random.Random(f"{state.seed}/{state.num_started}")
        at = state.tree[StepId(0)]
        while True:
            old = [state.tree[child] for child in at.children if self._goes_on(state.tree, state.tree[child])]
            new = -math.inf if at.is_dry else self._draw(state, at.direct, dice)
            if not old:
                return None if at.is_dry else at.node.id
            if not at.is_dry and (new >= self._draw(state, at.below.without(at.direct), dice)):
                return at.node.id
            at = max(old, key=lambda child: self._draw(state, child.below, dice))

    def _goes_on(self, tree: Mapping[StepId, Grown], grown: Grown) -> bool:
        """Whether a child can be made anywhere below."""
        pending = [grown]
        while pending:
            at = pending.pop()
            if at.node.is_terminal or (self.depth is not None and at.node.depth >= self.depth):
                continue
            if not at.is_dry:
                return True
            pending += [tree[child] for child in at.children]
        return False

    def _draw(self, state: AdaptiveBranchingState, sums: Sums, dice: random.Random) -> float:
        """A mean from the normal-inverse-chi-squared posterior (Murphy, 2023, section 3.4)."""
        span = state.high - state.low
        mean = (sums.total / sums.num - state.low) / span if sums.num and span > 0 else 0.0
        spread = (sums.squares - sums.total**2 / sums.num) / span**2 if sums.num and span > 0 else 0.0
        kappa, nu = _KAPPA + sums.num, _NU + sums.num
        scale = _NU * _TAU_SQUARE + max(0.0, spread) + sums.num * _KAPPA * mean**2 / kappa
        variance = scale / (2.0 * dice.gammavariate(nu / 2.0, 1.0))
        return dice.gauss(sums.num * mean / kappa, math.sqrt(variance / kappa))

    def tell(self, state: AdaptiveBranchingState, told: Told) -> AdaptiveBranchingState:
        """A child's value counts for its parent's children, and for all that is above."""
        assert isinstance(told, Expanded), "nothing else was asked"
        tree = dict(state.tree)
        parent = tree[told.node]
        if not told.children:
            tree[told.node] = replace(parent, num_failed=parent.num_failed + 1)
        for child in told.children:
            value = child.value or 0.0
            tree[child.id] = Grown(child)
            tree[told.node] = parent = replace(
                parent, children=(*parent.children, child.id), direct=parent.direct.add(value), num_failed=0
            )
            above: StepId | None = told.node
            while above is not None:
                tree[above] = replace(tree[above], below=tree[above].below.add(value))
                above = tree[above].node.parent
            parent = tree[told.node]
        values = [child.value or 0.0 for child in told.children]
        values += [state.low, state.high] if state.tree[StepId(0)].below.num else []
        return replace(
            state,
            tree=tree,
            best=best_of(state.best, *told.children),
            low=min(values, default=0.0),
            high=max(values, default=0.0),
            num_awaited=state.num_awaited - 1,
        )

    def best(self, state: AdaptiveBranchingState) -> StepId:
        """The goal, else the highest value seen."""
        return state.best.id

    def live(self, state: AdaptiveBranchingState) -> Collection[StepId]:
        """All that may get another child, and the best."""
        return {state.best.id, *(id_ for id_, grown in state.tree.items() if not grown.node.is_terminal)}

    def __str__(self) -> str:
        options = [str(self.iterations)]
        options += [f"parallel={self.parallel}"] if self.parallel != 1 else []
        options += [] if self.depth is None else [f"depth={self.depth}"]
        return f"AdaptiveBranching({', '.join(options)})"
