"""`dendrite bench search`, first half: what a search costs besides the model.

Children are made by code and scored by a hash, on an engine over a script, so no token goes through anything: what is
left is the strategy's own time and the search loop's.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from zlib import crc32

import dendrite as dd
from dendrite.bench.figures import Figure, figure
from dendrite.bench.rounds import Progress, Run, take_turns
from dendrite.dsl.strategies.base import Ask, Candidate, ProgramFacts, Strategy, Told
from dendrite.dsl.types import StepId
from dendrite.engine.engine import Engine
from dendrite.testing import scripted_engine

WIDTH = 5
MOST_MS = 1.0
"""Milliseconds that a strategy may take for a node."""
OWN, WHOLE = "strategy, a node", "whole loop, a node"


class Timed(Strategy[Any]):
    """Another strategy, and the seconds that it took."""

    def __init__(self, inner: Strategy[Any]) -> None:
        self.inner = inner
        self.chooses_frontier = inner.chooses_frontier  # type: ignore[misc]  # one class stands for all of them
        self.wants_logprobs = inner.wants_logprobs
        self.vote = inner.vote
        self.seconds = 0.0

    def check(self, facts: ProgramFacts) -> None:
        """As the other does."""
        self.inner.check(facts)

    def begin(self, root: Candidate, seed: int = 0) -> object:
        """As the other does."""
        return self.inner.begin(root, seed)

    def ask(self, state: object) -> tuple[object, Sequence[Ask]]:
        """As the other does, timed."""
        began = time.perf_counter()
        asked = self.inner.ask(state)
        self.seconds += time.perf_counter() - began
        return asked

    def tell(self, state: object, told: Told) -> object:
        """As the other does, timed."""
        began = time.perf_counter()
        after: object = self.inner.tell(state, told)
        self.seconds += time.perf_counter() - began
        return after

    def best(self, state: object) -> StepId:
        """As the other does, timed."""
        began = time.perf_counter()
        best = self.inner.best(state)
        self.seconds += time.perf_counter() - began
        return best

    def live(self, state: object) -> Collection[StepId]:
        """As the other does, timed."""
        began = time.perf_counter()
        live = self.inner.live(state)
        self.seconds += time.perf_counter() - began
        return live

    def __str__(self) -> str:
        return str(self.inner)


def overhead_figures(num_nodes: int, num_rounds: int, progress: Progress) -> Iterator[Figure]:
    """Milliseconds a node, of every strategy that can make `num_nodes` children without a model."""
    workload = f"{num_nodes:,} nodes"
    with scripted_engine(lambda _: "x", num_blocks=64 * num_nodes) as engine:
        runs: dict[str, Run] = {
            str(strategy): partial(_run, engine, strategy, num_nodes) for strategy in _strategies(num_nodes)
        }
        samples = take_turns(runs, num_rounds=num_rounds, progress=progress, workload=workload)
    for name, found in samples.items():
        yield figure(workload, name, OWN, "ms", found[OWN], at_most=MOST_MS)
        yield figure(workload, name, WHOLE, "ms", found[WHOLE])


def _strategies(num_nodes: int) -> list[Strategy[Any]]:
    expansions = num_nodes // WIDTH
    return [
        dd.Beam(depth=expansions),
        dd.DepthFirst(depth=8),
        dd.BestFirst(expansions, parallel=8),
        dd.MCTS(expansions, parallel=8),
        dd.LATS(expansions),
        dd.BestOfN(expansions, depth=WIDTH),
        dd.AdaptiveBranching(num_nodes, parallel=8),
    ]


@dd.expand
def _moves(node: dd.Node[int]) -> list[dd.Child[int]]:
    return [dd.Child(f" {node.id}.{index}", index) for index in range(WIDTH)]


@dd.observe
def _state(node: dd.Node[int]) -> int:
    return node.state


@dd.score
def _value(node: dd.Node[int]) -> float:
    return crc32(node.text.encode()) / 2**32


def _run(engine: Engine, strategy: Strategy[Any], num_nodes: int) -> Mapping[str, float]:
    timed = Timed(strategy)
    program = dd.compile(_moves, _state, _value, dd.prune(keep=50), strategy=timed)
    began = time.perf_counter()
    with program.run(engine, "Go.", state=0, seed=1, budget=dd.Budget(nodes=num_nodes)) as result:
        seconds, nodes = time.perf_counter() - began, result.usage.nodes
    return {OWN: timed.seconds / nodes * 1e3, WHOLE: seconds / nodes * 1e3}
