"""The one loop that runs every search: it executes the program's operations and holds the strategy's state.

    asks = strategy.ask              what to expand, to choose, to reflect on: all under way at the same time
    tell, in the order asked         each tell followed by the ask it frees, so that timing never changes a search
    release                          branches that the strategy let go of are pruned

All fronts (run, arun, stream, astream, start, map) drain the events of this loop and differ only in how they wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from dendrite.dsl.asking import reflect, vote
from dendrite.dsl.events import Event
from dendrite.dsl.expansion import expand
from dendrite.dsl.node import Node, Step
from dendrite.dsl.operations import Operations
from dendrite.dsl.result import Result, Stopped
from dendrite.dsl.run import Run
from dendrite.dsl.selecting import ranked, select
from dendrite.dsl.strategies.base import (
    Ask,
    Candidate,
    Expand,
    Expanded,
    Reflect,
    Reflected,
    Select,
    Selected,
    Told,
    Vote,
    Voted,
)
from dendrite.dsl.types import Prompt, StepId

if TYPE_CHECKING:  # at run time this file must not load pydantic
    from dendrite.engine.branch import Branch

T = TypeVar("T")


class _TimeIsUp(Exception):
    """The budget's seconds ended in the middle of an operation."""


@dataclass(slots=True, eq=False)
class _Flight:
    """One ask on its way; a choice is made when its turn to be told comes."""

    ask: Ask
    task: asyncio.Task[list[Step]] | asyncio.Task[Told] | None


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
        self._stopped: Stopped | None = None
        self._ran_out = False  # the budget refused what the strategy asked for
        self._chosen: list[Step] | None = None
        self._flights: deque[_Flight] = deque()
        self._standing: dict[StepId, Step] = {}  # told and not yet let go of
        self.is_cancelled = False
        """Set from outside to end before the next ask."""
        self.result: Result[object] | None = None

    async def events(self) -> AsyncGenerator[Event[object]]:
        """Run the search; closing this early, or any error, prunes all that it made."""
        try:
            async with aclosing(self._search()) as search:
                async for event in search:
                    yield event
            await self._end_flights()
            for event in self._run.take_events():
                yield event
            self.result = self._finished()
            yield Event("done", self.result.best, result=self.result)
        finally:
            try:
                await self._end_flights()
            finally:
                best = self._best().path if self.result is not None else []
                self._run.close(keep=best)

    def choose(self, nodes: Sequence[StepId]) -> None:
        """While a `frontier` event is out: these survive, in place of the program's own choice."""
        self._chosen = [self._run.steps[node] for node in nodes]

    async def _search(self) -> AsyncGenerator[Event[object]]:
        root = self._run.open_root(self._origin, self._prompt, self._state)
        self._stand([root])
        self._run.emit("opened", root)
        self._progress = self._strategy.begin(_candidate(root), self._run.draw_seed())
        self._ask()
        while self._flights and self._stopped is None:
            flight = self._flights[0]
            try:
                async for event in self._watched(flight.task):
                    yield event
                offered = self._offered(flight)
                for event in self._run.take_events():
                    yield event
                survivors = await self._in_time(self._choose(offered))
            except _TimeIsUp:
                self._stopped = "budget"
                break
            self._flights.popleft()
            self._tell(flight, survivors)
            self._release()
            for event in self._run.take_events():
                yield event

    # --- asks under way ----------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Start what the strategy asks for, unless the search is to end."""
        self._progress, asks = self._strategy.ask(self._progress)
        if self.is_cancelled:
            self._stopped = "cancelled"
        elif self._best().status == "goal":
            self._stopped = "goal"
        elif self._run.meter.is_spent(is_idle=not self._flights) and any(isinstance(ask, Expand) for ask in asks):
            self._ran_out = True
            asks = []  # what is under way is still told
        if self._stopped is None:
            self._flights += [_Flight(ask, self._started(ask)) for ask in asks]

    def _started(self, ask: Ask) -> asyncio.Task[list[Step]] | asyncio.Task[Told] | None:
        loop, run = asyncio.get_running_loop(), self._run
        match ask:
            case Expand():
                turn = run.next_turn("asks")
                run.expect(turn)
                return loop.create_task(expand(run, self._loop, ask, turn))
            case Reflect():
                return loop.create_task(reflect(run, ask))
            case Vote():
                assert self._loop.vote is not None, "compile() lowers the function of a strategy that votes"
                return loop.create_task(vote(run, self._loop.vote, ask))
            case Select():
                return None

    async def _watched(
        self, task: asyncio.Task[list[Step]] | asyncio.Task[Told] | None
    ) -> AsyncGenerator[Event[object]]:
        """What happens, wherever in the search, until the task is done."""
        while task is not None and not task.done():
            news = self._run.news()
            for event in self._run.take_events():
                yield event
            await self._in_time(asyncio.wait((task, news), return_when=asyncio.FIRST_COMPLETED))
        for event in self._run.take_events():
            yield event

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

    async def _end_flights(self) -> None:
        """Cancel what is still under way; nothing of it was told."""
        tasks = [flight.task for flight in self._flights if flight.task is not None]
        for task in tasks:
            task.cancel()
        self._flights.clear()
        with suppress(Exception):
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- choosing ----------------------------------------------------------------------------------------------

    def _offered(self, flight: _Flight) -> list[Step] | None:
        """The nodes among which a choice is to be made now, put before whoever watches; None if there is none."""
        steps: list[Step] = []
        if isinstance(flight.ask, Select):
            steps = [self._run.steps[node] for node in flight.ask.nodes]
        elif isinstance(flight.ask, Expand) and not self._strategy.chooses_frontier:
            children = [step for step in _children(flight) if self._run.is_live(step)]
            if not any(step.status == "goal" for step in children):
                steps = [step for step in children if step.status == "open"]
        if not steps:
            return None
        nodes = ranked(steps)
        self._run.emit("frontier", nodes[0], nodes=nodes)
        self._chosen = None
        return steps

    async def _choose(self, offered: list[Step] | None) -> list[Step] | None:
        if offered is None or self._chosen is not None:
            return self._chosen if offered is not None else None
        return await select(self._run, self._loop.select, offered)

    # --- telling -----------------------------------------------------------------------------------------------

    def _tell(self, flight: _Flight, survivors: list[Step] | None) -> None:
        """Tell what came of an ask, and start what is asked then."""
        ask = flight.ask
        about = self._run.steps[ask.nodes[0] if isinstance(ask, Select | Vote) else ask.node]
        match ask:
            case Expand():
                told: Told = self._expanded(ask, _children(flight), survivors)
            case Select():
                assert survivors is not None, "a choice was made"
                told = Selected(tuple(step.id for step in survivors))
            case Reflect() | Vote():
                assert flight.task is not None, "it was started"
                told = flight.task.result()  # type: ignore[assignment]
                if isinstance(ask, Reflect) and isinstance(told, Reflected) and not ask.is_kept:
                    self._run.reflections.append(told.text.strip())
        self._progress = self._strategy.tell(self._progress, told)
        if survivors is not None:
            self._run.emit("round", self._best(), nodes=survivors)
        elif isinstance(told, Reflected):
            self._run.emit("reflected", about, told.text)
        elif isinstance(told, Voted):
            self._run.emit("voted", about, nodes=[self._run.steps[node] for node in told.nodes])
        self._ask()
        self._run.emit("told", about)

    def _expanded(self, ask: Expand, made: list[Step], survivors: list[Step] | None) -> Expanded:
        self._stand(made)
        children = [step for step in made if self._run.is_live(step)]
        for step in children:
            if step.status == "goal":
                self._run.emit("goal", step)
        if survivors is not None:
            chosen = set(map(id, survivors))
            children = [step for step in children if id(step) in chosen or step.status != "open"]
        return Expanded(ask.node, tuple(map(_candidate, children)))

    def _stand(self, steps: Iterable[Step]) -> None:
        for step in steps:
            step.is_told = True
            if self._run.is_live(step):
                self._standing[step.id] = step

    def _release(self) -> None:
        """Prune what the strategy will not come back to, and is no ancestor of what it may."""
        under_way = [flight.ask.node for flight in self._flights if isinstance(flight.ask, Expand | Reflect)]
        keep = self._kept([*self._strategy.live(self._progress), *under_way])
        for step in [step for id_, step in self._standing.items() if id_ not in keep]:
            del self._standing[step.id]
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
        """The result, with all that the strategy was told; after a budget's end, with what was under way too."""
        best = self._best()
        stopped = "goal" if best.status == "goal" else self._stopped or ("budget" if self._ran_out else "done")
        steps = [step for step in self._run.steps if step.is_told or stopped == "budget"]
        for step in steps:
            if not step.is_told and step.status == "open":
                step.status = "pruned"
        nodes = [Node(step) for step in steps]
        return Result(nodes=nodes, best=Node(best), stopped=stopped, usage=self._run.meter.usage())


def _children(flight: _Flight) -> list[Step]:
    assert flight.task is not None, "expansions are started"
    return flight.task.result()  # type: ignore[return-value]


def _candidate(step: Step) -> Candidate:
    return Candidate(
        id=step.id,
        parent=None if step.parent is None else step.parent.id,
        depth=step.depth,
        value=step.value,
        prior=step.prior,
        logprob=step.logprob,
        is_terminal=step.status in ("terminal", "goal"),
        is_goal=step.status == "goal",
    )
