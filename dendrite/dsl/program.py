"""`dd.compile` and the program it returns, with all the ways to run one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from typing import TYPE_CHECKING, Any, Generic, cast

from dendrite.dsl.compiler import lower
from dendrite.dsl.events import Event
from dendrite.dsl.explain import explained
from dendrite.dsl.fronts import Waiter, iterated
from dendrite.dsl.functions import together
from dendrite.dsl.marks import Mark
from dendrite.dsl.node import Node
from dendrite.dsl.operations import Operations
from dendrite.dsl.progress import ProgressBar
from dendrite.dsl.records import Budget
from dendrite.dsl.result import Result
from dendrite.dsl.search import Search
from dendrite.dsl.search_loop import SearchLoop
from dendrite.dsl.starting import Order, Starter
from dendrite.dsl.strategies.base import Strategy
from dendrite.dsl.types import OnError, Prompt, S
from dendrite.engine.arguments import is_whole, shortened
from dendrite.engine.errors import ProgramError

if TYPE_CHECKING:  # at run time this file must not load pydantic
    from dendrite.engine.branch import Branch
    from dendrite.engine.engine import Engine

Part = Callable[[Node[S]], object] | Callable[[Sequence[Node[S]]], object] | Mark
"""What a program is made of: decorated functions, bound methods, and `dd.expand(...)` or `dd.prune(...)` alone."""

_NO_STATE: Any = None  # the one default that is of every state's type to the checker; at run time nodes hold None


class Program(Generic[S]):
    """A checked search program, made by `dd.compile`. It keeps nothing between runs, so one serves many.

    All ways of running take the same arguments:

    Args:
        on: an engine, which makes a new chat of the prompt; or a branch, which the search continues. The branch itself
            stays as it is.
        prompt: text is a user's turn on an engine, and is appended as it is to a branch. Messages are a chat.
        state: the root's state.
        seed: the same seed gives the same search; without one each run differs.
        budget: where to stop with what there is.
        journal: a file that gets every ask and tell, a line each, on the disk before the search goes on; `resume` goes
            on from it, whatever ended the process.
        progress: show a line on the terminal that counts along.
    """

    def __init__(
        self,
        parts: Sequence[object],
        strategy: Strategy,
        *,
        on_error: OnError = "raise",
        merge: Callable[..., Hashable] | None = None,
        names: Mapping[str, object] | None = None,
    ) -> None:
        self._parts = tuple(parts)
        self._merge = merge
        lowered = lower(parts, strategy, on_error=on_error, merge=merge, names=names or {})
        self._starter = Starter(lowered.operations, lowered.state, on_error)
        self._names = names or {}

    @property
    def operations(self) -> Operations:
        """The tree operations it compiled to; the search loop executes exactly these."""
        return self._starter.operations

    def explain(self) -> str:
        """The tree operations as text."""
        return explained(self._starter.operations, on_error=self._starter.on_error)

    def replace(self, *, strategy: Strategy) -> Program[S]:
        """The same program under another strategy, checked anew."""
        return Program(self._parts, strategy, on_error=self._starter.on_error, merge=self._merge, names=self._names)

    def run(
        self,
        on: Engine | Branch,
        prompt: Prompt = "",
        *,
        state: S = _NO_STATE,
        seed: int | None = None,
        budget: Budget | None = None,
        journal: PathLike[str] | str | None = None,
        progress: bool = False,
    ) -> Result[S]:
        """Search to the end. Works in any thread, inside a running event loop too (then on a thread of its own).

            with program.run(engine, "Use 4 9 10 13 to make 24.", seed=1) as result:
                print(result.best.transcript)

        Ctrl-C prunes all that the search made and is raised.

        Raises:
            ProgramError: arguments that this program cannot be run with.
            CallbackError: a function of the program raised or returned nonsense, unless compiled with
                `on_error="drop"`.
            EngineError: whatever stopped the engine. In each case nothing of the search is left.
        """
        order = Order(prompt=prompt, state=state, seed=seed, budget=budget)
        loop = self._starter.begin(on, order, journal=journal)
        with Waiter() as waiter:
            return waiter.wait(self._drained(loop, progress=progress))

    def resume(self, path: PathLike[str] | str, on: Engine | Branch, *, budget: Budget | None = None) -> Result[S]:
        """Go on with a search from its journal, or from what `Search.save` wrote, to the end it would have had.

            result = program.resume("run.jsonl", engine)

        What was told before is told again without the model; texts get new branches, whose K/V is computed when it is
        needed. What was under way when the process ended is made anew, from the same seeds. `usage` counts what was
        generated, the nodes and the seconds of both; figures of the engine are this process's.

        Args:
            path: the journal, which goes on too.
            on: what the search was started on, loaded again.
            budget: in place of the one the search was started with; what is spent stays spent.

        Raises:
            SnapshotError: no such journal, or one of another model, program, strategy, state type or branch; names
                which. Nothing is changed.
            ProgramError, CallbackError, EngineError: as for `run`.
        """
        loop = self._starter.reopen(path, on, budget)
        with Waiter() as waiter:
            return waiter.wait(self._drained(loop))

    async def aresume(
        self, path: PathLike[str] | str, on: Engine | Branch, *, budget: Budget | None = None
    ) -> Result[S]:
        """`resume` for asyncio."""
        return await self._drained(self._starter.reopen(path, on, budget))

    async def arun(
        self,
        on: Engine | Branch,
        prompt: Prompt = "",
        *,
        state: S = _NO_STATE,
        seed: int | None = None,
        budget: Budget | None = None,
        journal: PathLike[str] | str | None = None,
        progress: bool = False,
    ) -> Result[S]:
        """`run` for asyncio: async functions of the program run on this event loop. Cancelling it prunes everything."""
        order = Order(prompt=prompt, state=state, seed=seed, budget=budget)
        loop = self._starter.begin(on, order, journal=journal)
        return await self._drained(loop, progress=progress)

    def stream(
        self,
        on: Engine | Branch,
        prompt: Prompt = "",
        *,
        state: S = _NO_STATE,
        seed: int | None = None,
        budget: Budget | None = None,
    ) -> Generator[Event[S]]:
        """Search, telling what happens; the last event, `done`, has the result. Leaving the loop ends the search."""
        order = Order(prompt=prompt, state=state, seed=seed, budget=budget)
        return cast("Generator[Event[S]]", iterated(self._starter.begin(on, order).events()))

    def astream(
        self,
        on: Engine | Branch,
        prompt: Prompt = "",
        *,
        state: S = _NO_STATE,
        seed: int | None = None,
        budget: Budget | None = None,
    ) -> AsyncGenerator[Event[S]]:
        """`stream` for asyncio. Wrap it in `contextlib.aclosing` where the loop may be left early."""
        order = Order(prompt=prompt, state=state, seed=seed, budget=budget)
        return cast("AsyncGenerator[Event[S]]", self._starter.begin(on, order).events())

    def start(
        self,
        on: Engine | Branch,
        prompt: Prompt = "",
        *,
        state: S = _NO_STATE,
        seed: int | None = None,
        budget: Budget | None = None,
    ) -> Search[S]:
        """A search to step by hand; see `Search`."""
        order = Order(prompt=prompt, state=state, seed=seed, budget=budget)
        return Search(self._starter.begin(on, order, is_saved=True), lambda: self._starter.codec)

    def reopen(self, path: PathLike[str] | str, on: Engine | Branch, *, budget: Budget | None = None) -> Search[S]:
        """A search to step by hand from its journal, or from what `Search.save` wrote; the file goes on with it.

        Its first frontier is the one that was not chosen from yet.

        Raises:
            SnapshotError: as for `resume`.
        """
        return Search(self._starter.reopen(path, on, budget), lambda: self._starter.codec)

    def map(
        self,
        engine: Engine,
        inputs: Iterable[tuple[Prompt, S]],
        *,
        concurrency: int = 8,
        seed: int | None = None,
        budget: Budget | None = None,
    ) -> list[Result[S]]:
        """Run the program on many `(prompt, state)` inputs, `concurrency` at a time; results in their order.

        The first failure ends them all, with nothing left behind. `seed` and `budget` count for each input.
        """
        with Waiter() as waiter:
            return waiter.wait(self.amap(engine, inputs, concurrency=concurrency, seed=seed, budget=budget))

    async def amap(
        self,
        engine: Engine,
        inputs: Iterable[tuple[Prompt, S]],
        *,
        concurrency: int = 8,
        seed: int | None = None,
        budget: Budget | None = None,
    ) -> list[Result[S]]:
        """`map` for asyncio."""
        if not is_whole(concurrency) or concurrency < 1:
            raise ProgramError(
                f"map(concurrency={shortened(concurrency)}) runs nothing: give a whole number, 1 or more"
            )
        pairs: list[tuple[Prompt, S]] = _pairs(inputs)
        turns = asyncio.Semaphore(concurrency)
        results: list[Result[S]] = []

        async def one(prompt: Prompt, state: S) -> Result[S]:
            async with turns:
                result = await self.arun(engine, prompt, state=state, seed=seed, budget=budget)
                results.append(result)
                return result

        try:
            return await together([one(prompt, state) for prompt, state in pairs])
        except BaseException:
            for result in results:
                result.close()
            raise

    async def _drained(self, loop: SearchLoop, *, progress: bool = False) -> Result[S]:
        with ProgressBar(str(self._starter.operations[1].strategy)) if progress else nullcontext() as bar:
            async for event in loop.events():
                if bar is not None:
                    bar.saw(event)
        assert loop.result is not None, "a search that ended without an error has its result"
        return cast("Result[S]", loop.result)

    def __repr__(self) -> str:
        return f"<Program {self._starter.operations[1].strategy}>"


def _pairs(inputs: object) -> list[tuple[Prompt, S]]:
    if isinstance(inputs, str | bytes | Mapping) or not isinstance(inputs, Iterable):
        raise ProgramError(f"map({shortened(inputs)}): give (prompt, state) pairs")
    pairs = list(inputs)
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ProgramError(f"map() got {shortened(pair)} as input {index}: give (prompt, state) pairs")
    return pairs


def compile(  # noqa: A001 - the name users know
    *parts: Part[S],
    strategy: Strategy,
    on_error: OnError = "raise",
    merge: Callable[[Node[S]], Hashable] | None = None,
) -> Program[S]:
    """Build a search program out of decorated functions and a strategy.

        program = dd.compile(step, value, dd.prune(keep=3), strategy=dd.Beam(depth=3))
        print(program.explain())

    Args:
        parts: at least one `@expand`; any number of `@score`s; at most one `@observe` and one `@prune`.
        strategy: what drives the search.
        on_error: what a run does about a function that raises or returns nonsense, or about a score that is NaN or no
            number: "raise" ends it with a `CallbackError` that names function and node, "drop" drops the node and goes
            on. So it is with a node that has no room left in the model's context (`ContextOverflow`).
        merge: gives each node a key, called after `@observe`; of the nodes with equal keys only the first is kept,
            such as `merge=lambda node: node.state` where the way to a state does not matter.

    Raises:
        ProgramError: the program could not run: a part is missing, there is one too many, a part is not decorated, an
            option is out of range, two functions take different states, or the strategy lacks something. It says what
            and where.
    """
    caller = sys._getframe(1)  # noqa: SLF001 - states may be local classes, which annotations only name
    try:
        return Program(parts, strategy, on_error=on_error, merge=merge, names=dict(caller.f_locals))
    except ProgramError as error:
        error.add_note(f"compiled in {caller.f_code.co_filename}:{caller.f_lineno}")
        raise
