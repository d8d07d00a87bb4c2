"""Trees of known values that answer what strategies ask, the way the search loop does."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from pydantic import TypeAdapter

from dendrite.dsl.strategies.base import (
    Ask,
    Candidate,
    Expand,
    Expanded,
    Reflect,
    Reflected,
    Select,
    Selected,
    Strategy,
    Told,
    Vote,
    Voted,
)
from dendrite.dsl.types import StepId

Path = tuple[int, ...]
Values = dict[Path, float]


class World:
    """A tree given by the values of its paths; `(0, 2)` is the third child of the root's first."""

    def __init__(
        self,
        values: Values,
        *,
        width: int,
        keep: int | None = None,
        terminal: frozenset[Path] = frozenset(),
        goal: Path | None = None,
        ballot: Callable[[Path], Hashable] = lambda path: path,
    ) -> None:
        self.values = values
        self.width = width
        self.keep = keep
        self.terminal = terminal
        self.goal = goal
        self.logprobs: Values = {}
        self.ballot = ballot
        self.nodes = [Candidate(StepId(0), None, 0)]
        self.paths: list[Path] = [()]
        self.asks: list[Ask] = []

    def answer(self, ask: Ask) -> Told:
        """What came of it."""
        self.asks.append(ask)
        match ask:
            case Select(nodes):
                ranked = sorted(nodes, key=lambda node: self.nodes[node].rank, reverse=True)
                return Selected(tuple(ranked[: self.keep]))
            case Vote(nodes):
                numbers: dict[Hashable, int] = {}
                said = [self.ballot(self.paths[node]) for node in nodes]
                ballots = (None if vote is None else numbers.setdefault(vote, len(numbers)) for vote in said)
                return Voted(nodes, tuple(ballots))
            case Reflect(node):
                return Reflected(node, f"thought about {self.paths[node]}")
            case Expand(node, width):
                return Expanded(node, tuple(self._made(self.paths[node], node, width)))

    def _made(self, path: Path, parent: StepId, width: int | None) -> list[Candidate]:
        """All children, or the next `width` that were not made yet."""
        children = (child for child in ((*path, index) for index in range(self.width)) if child in self.values)
        if width is not None:
            left = (child for child in children if child not in self.paths)
            children = (child for child, _ in zip(left, range(width), strict=False))
        return [self.add(child, parent) for child in list(children)]

    def add(self, path: Path, parent: StepId) -> Candidate:
        """A new node."""
        node = Candidate(
            StepId(len(self.nodes)),
            parent,
            len(path),
            self.values[path],
            logprob=self.logprobs.get(path),
            is_terminal=path in self.terminal or path == self.goal,
            is_goal=path == self.goal,
        )
        self.nodes.append(node)
        self.paths.append(path)
        return node

    @property
    def expanded(self) -> list[Path]:
        """What was expanded, in order."""
        return [self.paths[ask.node] for ask in self.asks if isinstance(ask, Expand)]


def searched(strategy: Strategy[Any], world: World, *, seed: int = 0) -> Path:
    """Drive a strategy to its end, as the loop does, and return the path of its best node.

    Before every step the state goes through JSON: whatever does not survive that shows.
    """
    state = strategy.begin(world.nodes[0], seed)
    adapter = TypeAdapter(type(state))
    state, asks = strategy.ask(state)
    waiting = list(asks)
    while waiting:
        restored = adapter.validate_json(adapter.dump_json(state))
        assert restored == state
        state = restored
        before = replace(state)
        told = world.answer(waiting.pop(0))
        after = strategy.tell(state, told)
        assert state == before, "telling changed the state it was given"
        could_be_asked = {*strategy.live(after), world.nodes[0].id}
        state, asks = strategy.ask(after)
        waiting += asks
        assert {ask.node for ask in asks if isinstance(ask, Expand | Reflect)} <= could_be_asked
        assert strategy.best(state) in strategy.live(state)
    return world.paths[strategy.best(state)]


@st.composite
def worlds(draw: st.DrawFn, *, num_levels: int = 3) -> World:
    """Small random trees with distinct values, dead ends and terminal nodes."""
    width = draw(st.integers(1, 3))
    values: Values = {}
    level: list[Path] = [()]
    distinct = draw(st.permutations(range(60)))
    for _ in range(num_levels):
        level = [(*path, i) for path in level for i in range(width) if draw(st.integers(0, 4))]
        for path in level:
            values[path] = float(distinct[len(values)])
    terminal = frozenset(draw(st.sets(st.sampled_from(sorted(values)), max_size=4)) if values else ())
    reachable = {path: value for path, value in values.items() if not _below(path, terminal)}
    return World(reachable, width=width, keep=draw(st.none() | st.integers(1, 3)), terminal=terminal)


def _below(path: Path, ends: frozenset[Path]) -> bool:
    return any(path[:length] in ends for length in range(1, len(path)))
