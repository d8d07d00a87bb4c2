"""Independent paths: the best of them, or what most of them vote for (self-consistency, Wang et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Generic

from dendrite.dsl.node import Node
from dendrite.dsl.strategies.base import Ask, Candidate, Expand, Expanded, ProgramFacts, Strategy, Told, Vote, Voted
from dendrite.dsl.strategies.common import best_of, check_counts, check_has_score, check_tells_apart
from dendrite.dsl.types import S, StepId


@dataclass(frozen=True, slots=True)
class BestOfNState:
    """Paths that grow, and paths that ended."""

    growing: tuple[Candidate, ...]
    """The last nodes of paths that may be asked for one more step."""
    awaited: tuple[Candidate, ...] = ()
    """Those that were asked for it."""
    ended: tuple[Candidate, ...] = ()
    winner: Candidate | None = None
    """What the vote said."""
    is_voting: bool = False


class BestOfN(Strategy[BestOfNState], Generic[S]):
    """The best of `n` independent paths, or what most of them vote for.

        dd.compile(solution, right, strategy=dd.BestOfN(16))                  # the highest score
        dd.compile(solution, strategy=dd.BestOfN(16, vote=answer))            # majority
        dd.compile(solution, right, strategy=dd.BestOfN(16, vote=answer, weighted=True))

    `width` of the program counts for nothing here: `n` children of the root share its prompt, and each path goes on by
    one child. A goal ends the search.

    Args:
        n: how many paths.
        vote: what a path's last node votes for; None abstains. Of the answer with most votes the best node is returned;
            equal numbers of votes are decided by the values, then by who came first.
        weighted: count each vote as the node's value.
        depth: steps of a path.
    """

    def __init__(
        self, n: int, *, vote: Callable[[Node[S]], Hashable] | None = None, weighted: bool = False, depth: int = 1
    ) -> None:
        self.n = n
        self.vote = vote
        self.weighted = weighted
        self.depth = depth

    def check(self, facts: ProgramFacts) -> None:
        """Refuse counts below 1, weights without a score, and a program without score, vote or goal."""
        check_counts(self, n=self.n, depth=self.depth)
        if self.weighted:
            check_has_score(self, facts, "to weigh votes with")
        if self.vote is None:
            check_tells_apart(self, facts)

    def begin(self, root: Candidate, seed: int = 0) -> BestOfNState:
        """All paths start at the root; what is drawn, the model draws."""
        del seed
        return BestOfNState(growing=(root,))

    def ask(self, state: BestOfNState) -> tuple[BestOfNState, Sequence[Ask]]:
        """A step for every path that grows; at the end, the vote."""
        if goal_found(state):
            return state, ()
        if state.growing:
            asks: list[Ask] = [Expand(node.id, width=self.n if node.depth == 0 else 1) for node in state.growing]
            return replace(state, growing=(), awaited=(*state.awaited, *state.growing)), asks
        if self.vote is None or state.is_voting or state.awaited or not state.ended:
            return state, ()
        return replace(state, is_voting=True), (Vote(tuple(node.id for node in state.ended)),)

    def tell(self, state: BestOfNState, told: Told) -> BestOfNState:
        """Paths go on or end; a path that finds no child ends where it is."""
        if isinstance(told, Voted):
            return replace(state, winner=self._winner(state.ended, told.ballots))
        assert isinstance(told, Expanded), "nothing else was asked"
        parent = next(node for node in state.awaited if node.id == told.node)
        ended = [child for child in told.children if child.is_terminal or child.depth >= self.depth]
        growing = [child for child in told.children if not (child.is_terminal or child.depth >= self.depth)]
        return replace(
            state,
            awaited=tuple(node for node in state.awaited if node.id != told.node),
            growing=(*state.growing, *growing),
            ended=(*state.ended, *(ended if told.children else [parent])),
        )

    def _winner(self, ended: Sequence[Candidate], ballots: Sequence[int | None]) -> Candidate | None:
        groups: dict[int, list[Candidate]] = {}
        for node, ballot in zip(ended, ballots, strict=True):
            if ballot is not None:
                groups.setdefault(ballot, []).append(node)
        if not groups:
            return None
        weight = (lambda node: node.value or 0.0) if self.weighted else (lambda _: 1.0)
        winners = max(groups.values(), key=lambda group: (sum(map(weight, group)), best_of(*group).rank))
        return best_of(*winners)

    def best(self, state: BestOfNState) -> StepId:
        """The goal, else the winner of the vote, else the highest value."""
        if state.winner is not None and not goal_found(state):
            return state.winner.id
        return best_of(*(state.ended or (*state.awaited, *state.growing))).id

    def live(self, state: BestOfNState) -> Collection[StepId]:
        """The ends of all paths."""
        return {node.id for node in (*state.growing, *state.awaited, *state.ended)}

    def __str__(self) -> str:
        options = [str(self.n)]
        if self.vote is not None:
            options.append(f"vote={getattr(self.vote, '__name__', self.vote)}")
        options += ["weighted=True"] if self.weighted else []
        options += [f"depth={self.depth}"] if self.depth != 1 else []
        return f"BestOfN({', '.join(options)})"


def goal_found(state: BestOfNState) -> bool:
    """Whether a path has reached a goal."""
    return any(node.is_goal for node in state.ended)
