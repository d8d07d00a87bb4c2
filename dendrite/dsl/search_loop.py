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
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dendrite.dsl.asking import reflect, vote
from dendrite.dsl.codec import Codec
from dendrite.dsl.events import Event
from dendrite.dsl.expansion import Brood, expand
from dendrite.dsl.log import Log, candidate
from dendrite.dsl.node import Node, Step
from dendrite.dsl.operations import Operations
from dendrite.dsl.result import Result, Stopped
from dendrite.dsl.run import Run
from dendrite.dsl.selecting import ranked, select
from dendrite.dsl.strategies.base import (
    Ask,
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
    task: asyncio.Task[Brood] | asyncio.Task[Told] | None


class SearchLoop:
    """One search. `events` runs it; `result` is there afterwards."""

    def __init__(
        self,
        operations: Operations,
        run: Run,
        *,
        origin: Branch | None,
        prompt: Prompt,
        state: object,
        log: Log | None = None,
    ) -> None:
        _, self._loop, _ = operations
        self._strategy = self._loop.strategy
        self._run = run
        self._origin = origin
        self._prompt = prompt
        self._state = state
        self._log = log
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
                self.close()
                best = self._best().path if self.result is not None else []
                self._run.close(keep=best)

    def close(self) -> None:
        """Let go of the journal, as `events` does at its end: for a search that was never begun."""
        if self._log is not None:
            self._log.close()

    def choose(self, nodes: Sequence[StepId]) -> None:
        """While a `frontier` event is out: these survive, in place of the program's own choice."""
        self._chosen = [self._run.steps[node] for node in nodes]

    def save(self, path: Path, codec: Codec) -> None:
        """Write down what was told so far."""
        assert self._log is not None, "searches that may be saved have a log"
        self._log.save(path, codec)

    async def _search(self) -> AsyncGenerator[Event[object]]:
        root = self._run.open_root(self._origin, self._prompt, self._state)
        self._stand([root])
        self._run.emit("opened", root)
        self._progress = self._strategy.begin(candidate(root), self._run.draw_seed())
        self._start(await self._replayed())
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
            self._release([other.ask for other in self._flights])
            for event in self._run.take_events():
                yield event

    # --- asks under way ----------------------------------------------------------------------------------------

    def _asked(self) -> Sequence[Ask]:
        """What the strategy asks for next."""
        self._progress, asks = self._strategy.ask(self._progress)
        return asks

    def _start(self, asks: Sequence[Ask]) -> None:
        """Start what is asked for, unless the search is to end."""
        if self.is_cancelled:
            self._stopped = "cancelled"
        elif self._best().status == "goal":
            self._stopped = "goal"
        elif self._run.meter.is_spent(is_idle=not self._flights) and any(isinstance(ask, Expand) for ask in asks):
            self._ran_out = True
            return  # what is under way is still told
        if self._stopped is None:
            for ask in asks:
                if self._log is not None:
                    self._log.asked(ask)
                self._flights.append(_Flight(ask, self._started(ask)))

    async def _replayed(self) -> Sequence[Ask]:
        """Tell what a journal has, in place of what is asked; what is asked after that."""
        asks = deque(self._asked())
        if self._log is None:
            return asks
        for line in self._log.lines:
            told, made = await self._log.again(self._run, asks, line, self._loop)
            self._stand(made)
            self._progress = self._strategy.tell(self._progress, told)
            asks += self._asked()
            self._release(asks)
        self._log.is_live = True
        return asks

    def _started(self, ask: Ask) -> asyncio.Task[Brood] | asyncio.Task[Told] | None:
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

    async def _watched(self, task: asyncio.Task[Brood] | asyncio.Task[Told] | None) -> AsyncGenerator[Event[object]]:
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
            children = [step for step in _brood(flight).children if self._run.is_live(step)]
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
        ask, run = flight.ask, self._run
        about = run.steps[ask.nodes[0] if isinstance(ask, Select | Vote) else ask.node]
        made: list[Step] = []
        match ask:
            case Expand():
                made = _brood(flight).children
                told: Told = self._expanded(ask, made, survivors)
            case Select():
                assert survivors is not None, "a choice was made"
                told = Selected(tuple(step.id for step in survivors))
            case Reflect() | Vote():
                assert flight.task is not None, "it was started"
                said = flight.task.result()
                assert not isinstance(said, Brood), "only expansions bring children"
                told = said
        if isinstance(ask, Reflect) and isinstance(told, Reflected) and not ask.is_kept:
            run.reflections.append(told.text.strip())
        if self._log is not None:
            num_proposals = _brood(flight).num_proposals if isinstance(ask, Expand) else 0
            self._log.told(told, made, num_proposals=num_proposals, spent=run.meter.spent)
        self._progress = self._strategy.tell(self._progress, told)
        if survivors is not None:
            run.emit("round", self._best(), nodes=survivors)
        elif isinstance(told, Reflected):
            run.emit("reflected", about, told.text)
        elif isinstance(told, Voted):
            run.emit("voted", about, nodes=[run.steps[node] for node in told.nodes])
        self._start(self._asked())
        run.emit("told", about)

    def _expanded(self, ask: Expand, made: list[Step], survivors: list[Step] | None) -> Expanded:
        self._stand(made)
        children = [step for step in made if self._run.is_live(step)]
        for step in children:
            if step.status == "goal":
                self._run.emit("goal", step)
        if survivors is not None:
            chosen = set(map(id, survivors))
            children = [step for step in children if id(step) in chosen or step.status != "open"]
        return Expanded(ask.node, tuple(map(candidate, children)))

    def _stand(self, steps: Iterable[Step]) -> None:
        for step in steps:
            step.is_told = True
            if self._run.is_live(step):
                self._standing[step.id] = step

    def _release(self, under_way: Iterable[Ask]) -> None:
        """Prune what the strategy will not come back to, and is no ancestor of what it may."""
        asked = [ask.node for ask in under_way if isinstance(ask, Expand | Reflect)]
        keep = self._kept([*self._strategy.live(self._progress), *asked])
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
        stopped = (
            "goal"
            if best.status == "goal"
            else self._stopped or ("budget" if self._ran_out or self._run.meter.has_refused else "done")
        )
        steps = [step for step in self._run.steps if step.is_told or stopped == "budget"]
        for step in steps:
            if not step.is_told and step.status == "open":
                step.status = "pruned"
        nodes = [Node(step) for step in steps]
        return Result(nodes=nodes, best=Node(best), stopped=stopped, usage=self._run.meter.usage())


def _brood(flight: _Flight) -> Brood:
    assert flight.task is not None, "expansions are started"
    brood = flight.task.result()
    assert isinstance(brood, Brood), "expansions bring children"
    return brood
