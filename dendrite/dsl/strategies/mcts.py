"""Monte Carlo tree search over steps: UCT (Kocsis and Szepesvári, 2006), PUCT (Rosin, 2011; Silver et al., 2017)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from dendrite.dsl.strategies.base import Ask, Candidate, Expand, Expanded, ProgramFacts, Strategy, Told
from dendrite.dsl.strategies.common import best_of, check_counts, check_has_score
from dendrite.dsl.strategies.visits import Tree, Visited, backed_up, expanded, leaf_by, pending
from dendrite.dsl.types import StepId, as_finite
from dendrite.engine.arguments import is_whole
from dendrite.engine.errors import ProgramError


@dataclass(frozen=True, slots=True)
class Rollout:
    """A leaf that is being played out: `tip` is the end of the play so far."""

    leaf: StepId
    tip: Candidate
    num_left: int
    is_asked: bool = False


@dataclass(frozen=True, slots=True)
class MCTSState:
    """The tree with its visits, and what is under way."""

    tree: Tree
    best: Candidate
    low: float = 0.0
    high: float = 0.0
    """The range of values seen; the search looks at values within it as at 0 to 1."""
    num_values: int = 0
    num_started: int = 0
    num_awaited: int = 0
    rollouts: tuple[Rollout, ...] = ()


class MCTS(Strategy[MCTSState]):
    """Monte Carlo tree search: again and again descends to the most urgent leaf, expands it, and backs its values up.

        dd.compile(step, value, strategy=dd.MCTS(64, parallel=8))

    Every child is scored as it is made, which is its first visit. Values are compared within the range seen so far, so
    any scale will do. While leaves are under way, each counts as a visit of the lowest value (virtual loss), so that
    the next one looks elsewhere. A subtree that is explored to its end is left alone. The best is the goal, which ends
    the search, else the highest value, deeper first where values are equal.

    Args:
        iterations: leaves expanded, or played out, at most.
        parallel: leaves under way at the same time.
        rule: "uct" weighs a child's values against its visits; "puct" its prior too: what `@expand` and `Child` said,
            times the model's own mean probability of a token of the child, as shares among its siblings.
        exploration: the weight of what is less visited.
        backup: what a node is worth: the "mean" of what was seen below it, or the "max".
        rollout: play a leaf out by this many steps of one child each before it is expanded; its value is that of the
            play's end. 0 takes the leaf's own score.
        depth: steps of the longest path; None has no limit.
    """

    def __init__(
        self,
        iterations: int,
        *,
        parallel: int = 1,
        rule: Literal["uct", "puct"] = "uct",
        exploration: float = math.sqrt(2),
        backup: Literal["mean", "max"] = "mean",
        rollout: int = 0,
        depth: int | None = None,
    ) -> None:
        self.iterations = iterations
        self.parallel = parallel
        self.rule = rule
        self.exploration = exploration
        self.backup = backup
        self.rollout = rollout
        self.depth = depth
        self.wants_logprobs = rule == "puct"

    def check(self, facts: ProgramFacts) -> None:
        """Refuse counts out of range, unknown rules, and a program without a score."""
        check_counts(self, iterations=self.iterations, parallel=self.parallel)
        if self.depth is not None:
            check_counts(self, depth=self.depth)
        check_has_score(self, facts, "to back up")
        if self.rule not in ("uct", "puct"):
            raise ProgramError(f'{self}: rule={self.rule!r} is unknown: give "uct" or "puct"')
        if self.backup not in ("mean", "max"):
            raise ProgramError(f'{self}: backup={self.backup!r} is unknown: give "mean" or "max"')
        exploration = as_finite(self.exploration)
        if exploration is None or exploration < 0:
            raise ProgramError(f"{self}: exploration={self.exploration!r} cannot be used: give 0 or more")
        if not is_whole(self.rollout) or self.rollout < 0:
            raise ProgramError(f"{self}: rollout={self.rollout!r} cannot be used: give a whole number, 0 or more")

    def begin(self, root: Candidate, seed: int = 0) -> MCTSState:
        """A tree of the root alone; nothing is drawn."""
        del seed
        return MCTSState(tree={root.id: Visited(root)}, best=root)

    def ask(self, state: MCTSState) -> tuple[MCTSState, Sequence[Ask]]:
        """Plays that go on, then new leaves, as many as may be under way."""
        asks: list[Ask] = []
        if state.best.is_goal:
            return state, asks
        asks += [Expand(play.tip.id, width=1) for play in state.rollouts if not play.is_asked]
        state = replace(state, rollouts=tuple(replace(play, is_asked=True) for play in state.rollouts))
        while state.num_awaited < self.parallel and state.num_started < self.iterations:
            leaf = leaf_by(state.tree, StepId(0), partial(self._urgency, state))
            if leaf is None:
                break
            seen = state.tree[leaf]
            is_played = self.rollout > 0 and seen.num_visits == 0 and seen.node.parent is not None
            play = (Rollout(leaf, seen.node, self.rollout, is_asked=True),) if is_played else ()
            asks.append(Expand(leaf, width=1) if is_played else Expand(leaf))
            state = replace(
                state,
                tree=pending(state.tree, leaf, 1),
                num_started=state.num_started + 1,
                num_awaited=state.num_awaited + 1,
                rollouts=(*state.rollouts, *play),
            )
        return state, asks

    def tell(self, state: MCTSState, told: Told) -> MCTSState:
        """Grow the tree and back values up, or take a play one step further."""
        assert isinstance(told, Expanded), "nothing else was asked"
        state = _seen(state, told.children)
        play = next((play for play in state.rollouts if play.tip.id == told.node), None)
        if play is not None:
            return self._played(state, play, told.children)
        tree = expanded(pending(state.tree, told.node, -1), told.node, told.children, depth=self.depth)
        for child in told.children:
            if not self.rollout or tree[child.id].is_closed:  # else its first visit is a play
                tree = backed_up(tree, child.id, child.value or 0.0)
        return replace(state, tree=tree, num_awaited=state.num_awaited - 1)

    def _played(self, state: MCTSState, play: Rollout, children: Sequence[Candidate]) -> MCTSState:
        others = tuple(other for other in state.rollouts if other is not play)
        tip = children[0] if children else play.tip
        is_over = not children or play.num_left == 1 or tip.is_terminal or tip.depth == self.depth
        if not is_over:
            return replace(state, rollouts=(*others, Rollout(play.leaf, tip, play.num_left - 1)))
        tree = backed_up(pending(state.tree, play.leaf, -1), play.leaf, tip.value or 0.0)
        return replace(state, tree=tree, num_awaited=state.num_awaited - 1, rollouts=others)

    # --- urgency -----------------------------------------------------------------------------------------------

    def _urgency(self, state: MCTSState, parent: Visited, child: Visited) -> float:
        num, above = child.num_visits + child.num_pending, parent.num_visits + parent.num_pending
        if self.rule == "puct":
            return self._worth(state, child) + self.exploration * self._prior(state, parent, child) * (
                math.sqrt(above) / (1 + num)
            )
        if num == 0:
            return math.inf
        return self._worth(state, child) + self.exploration * math.sqrt(math.log(max(1, above)) / num)

    def _worth(self, state: MCTSState, seen: Visited) -> float:
        """0 to 1 within the values seen; leaves under way count as the lowest."""
        if not seen.num_visits or state.high == state.low:
            return 0.0
        value = seen.total / seen.num_visits if self.backup == "mean" or seen.highest is None else seen.highest
        worth = (value - state.low) / (state.high - state.low)
        return worth * seen.num_visits / (seen.num_visits + seen.num_pending)

    def _prior(self, state: MCTSState, parent: Visited, child: Visited) -> float:
        siblings = [state.tree[other].node for other in parent.children or ()]
        whole = sum(map(_mass, siblings))
        return _mass(child.node) / whole if whole else 1 / len(siblings)

    def best(self, state: MCTSState) -> StepId:
        """The goal, else the highest value seen."""
        return state.best.id

    def live(self, state: MCTSState) -> Collection[StepId]:
        """What may still be expanded or played out, and the best."""
        leaves = {id_ for id_, seen in state.tree.items() if seen.children is None and not seen.is_closed}
        return leaves | {state.best.id, *(play.tip.id for play in state.rollouts)}

    def _options(self) -> list[str]:
        default = MCTS(self.iterations)
        names = ("parallel", "rule", "exploration", "backup", "rollout", "depth")
        given = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(default, name)}
        return [str(self.iterations), *(f"{name}={value!r}" for name, value in given.items())]

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._options())})"


def _mass(node: Candidate) -> float:
    return node.prior * (1.0 if node.logprob is None else math.exp(node.logprob))


def _seen(state: MCTSState, children: Sequence[Candidate]) -> MCTSState:
    values = [child.value or 0.0 for child in children]
    known = [state.low, state.high] if state.num_values else []
    return replace(
        state,
        best=best_of(state.best, *children),
        low=min([*known, *values], default=0.0),
        high=max([*known, *values], default=0.0),
        num_values=state.num_values + len(values),
    )
