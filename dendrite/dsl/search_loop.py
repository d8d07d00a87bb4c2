"""The one loop that runs every search: it executes the program's operations and holds the strategy's state.

    asks = strategy.ask              what to expand, what to select
    wave of expansions               each operation once, over all nodes asked for: the engine sees one batch
    tell, in the order asked         each tell followed by the ask it frees
    release                          branches that the strategy let go of are pruned

All fronts (run, arun, stream, astream, start, map) drain the events of this loop and differ only in how they wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from dendrite.dsl import expansion, judging
from dendrite.dsl.events import Event
from dendrite.dsl.expansion import Wave
from dendrite.dsl.node import Node, Step
from dendrite.dsl.operations import Append, Expansion, Fork, Generate, Observe, Operations, Propose, Score
from dendrite.dsl.result import Result, Stopped
from dendrite.dsl.run import Run
from dendrite.dsl.strategies.base import Ask, Candidate, Expand, Expanded, Select, Selected, Told
from dendrite.dsl.types import Prompt, StepId

if TYPE_CHECKING:  # at run time this file must not load pydantic
    from dendrite.engine.branch import Branch

T = TypeVar("T")


class _TimeIsUp(Exception):
    """The budget's seconds ended in the middle of an operation."""


class SearchLoop:
    """One search. `events` runs it; `result` is there afterwards."""

    def __init__(
        self, operations: Operations, run: Run, *, origin: Branch | None, prompt: Prompt, state: object
    ) -> None:
        _, self._loop, _ = operations
        self._strategy = self._loop.strategy
        self._run = run
        self._origin = origin
        self._prompt = prompt
        self._state = state
        self._stopped: Stopped = "done"
        self._chosen: list[Step] | None = None
        self.is_cancelled = False
        """Set from outside to end before the next wave."""
        self.result: Result[object] | None = None

    async def events(self) -> AsyncGenerator[Event[object]]:
        """Run the search; closing this early, or any error, prunes all that it made."""
        try:
            async for event in self._search():
                yield event
            self.result = self._finished()
            yield Event("done", self.result.best, result=self.result)
        finally:
            best = self._best().path if self.result is not None else []
            self._run.close(keep=best)

    def choose(self, nodes: Sequence[StepId]) -> None:
        """While a `frontier` event is out: these survive, in place of the program's own choice."""
        self._chosen = [self._run.steps[node] for node in nodes]

    async def _search(self) -> AsyncGenerator[Event[object]]:
        root = self._run.open_root(self._origin, self._prompt, self._state)
        self._run.emit("opened", root)
        self._progress, asks = self._strategy.ask(self._strategy.begin(_candidate(root)))
        while asks and not self._must_stop(asks):
            wave = Wave([self._run.steps[ask.node] for ask in asks if isinstance(ask, Expand)])
            selected: dict[Select, list[Step]] = {}
            try:
                for operation in self._loop.body if wave.parents else ():
                    await self._in_time(self._execute(operation, wave))
                    for event in self._watched():
                        yield event
                for ask in asks:
                    if isinstance(ask, Select):
                        self._offer(ask)
                        for event in self._watched():
                            yield event
                        selected[ask] = await self._in_time(self._select(ask))
                asks = self._tell(asks, wave, selected)
            except _TimeIsUp:
                self._stopped, asks = "budget", []
            self._release()
            for event in self._watched():
                yield event

    def _must_stop(self, asks: Sequence[Ask]) -> bool:
        """Whether to end before these asks; choosing among what is there is never refused by a budget."""
        if self.is_cancelled:
            self._stopped = "cancelled"
        elif self._run.meter.is_spent and any(isinstance(ask, Expand) for ask in asks):
            self._stopped = "budget"
        return self._stopped != "done"

    # --- executing ---------------------------------------------------------------------------------------------

    async def _execute(self, operation: Expansion, wave: Wave) -> None:
        run = self._run
        match operation:
            case Propose(sources):
                await expansion.propose(run, sources, wave)
            case Append():
                expansion.append(run, wave)
            case Fork():
                expansion.fork(run, wave)
            case Generate():
                await expansion.generate(run, wave)
            case Observe():
                await judging.observe(run, operation, wave)
            case Score():
                await judging.score(run, operation, wave)

    async def _in_time(self, work: Coroutine[object, object, T]) -> T:
        """Await `work`, but no longer than the budget has seconds."""
        try:
            async with asyncio.timeout(self._run.meter.seconds_left()) as limit:
                return await work
        except TimeoutError:
            if limit.expired():
                raise _TimeIsUp from None
            raise
        finally:
            self._run.meter.look()

    def _offer(self, ask: Select) -> None:
        nodes = judging.ranked([self._run.steps[node] for node in ask.nodes])
        self._run.emit("frontier", nodes[0], nodes=nodes)
        self._chosen = None

    async def _select(self, ask: Select) -> list[Step]:
        if self._chosen is not None:
            return self._chosen
        return await judging.select(self._run, self._loop.select, [self._run.steps[node] for node in ask.nodes])

    # --- telling -----------------------------------------------------------------------------------------------

    def _tell(self, asks: Sequence[Ask], wave: Wave, selected: dict[Select, list[Step]]) -> list[Ask]:
        """Tell every result in the order asked; what is asked next."""
        freed: list[Ask] = []
        families = wave.families()
        for ask in asks:
            if isinstance(ask, Expand):
                told: Told = self._expanded(ask, families[ask.node])
            else:
                told = Selected(tuple(step.id for step in selected[ask]))
            self._progress = self._strategy.tell(self._progress, told)
            if isinstance(ask, Select):
                self._run.emit("round", self._best(), nodes=selected[ask])
            self._progress, more = self._strategy.ask(self._progress)
            freed += more
        return freed

    def _expanded(self, ask: Expand, children: Sequence[Step]) -> Expanded:
        for step in children:
            if step.status == "goal":
                self._run.emit("goal", step)
        return Expanded(ask.node, tuple(map(_candidate, children)))

    def _release(self) -> None:
        """Prune what the strategy will not come back to, and is no ancestor of what it may."""
        keep = self._kept(self._strategy.live(self._progress))
        for step in self._run.steps:
            if step.id not in keep and self._run.is_live(step):
                self._run.release(step)
                if step.status == "open":
                    step.status = "pruned"
                    self._run.emit("pruned", step)

    def _kept(self, live: Iterable[StepId]) -> set[StepId]:
        kept: set[StepId] = set()
        for node in live:
            step: Step | None = self._run.steps[node]
            while step is not None and step.id not in kept:
                kept.add(step.id)
                step = step.parent
        return kept

    def _best(self) -> Step:
        return self._run.steps[self._strategy.best(self._progress)]

    def _finished(self) -> Result[object]:
        best = self._best()
        if best.status == "goal":
            self._stopped = "goal"
        nodes = [Node(step) for step in self._run.steps]
        return Result(nodes=nodes, best=Node(best), stopped=self._stopped, usage=self._run.meter.usage())

    def _watched(self) -> list[Event[object]]:
        return self._run.take_events()


def _candidate(step: Step) -> Candidate:
    return Candidate(
        id=step.id,
        parent=None if step.parent is None else step.parent.id,
        depth=step.depth,
        value=step.value,
        prior=step.prior,
        is_terminal=step.status in ("terminal", "goal"),
        is_goal=step.status == "goal",
    )
