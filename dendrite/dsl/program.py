"""`dd.compile` and the program it returns, with all the ways to run one."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import random
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, cast

from dendrite.dsl.codec import Codec
from dendrite.dsl.compiler import lower
from dendrite.dsl.events import Event
from dendrite.dsl.explain import explained
from dendrite.dsl.fronts import Waiter, iterated
from dendrite.dsl.functions import together
from dendrite.dsl.journal import VERSION, Journal, check_same, create, functions_of, read
from dendrite.dsl.log import Log
from dendrite.dsl.marks import Mark
from dendrite.dsl.meter import Meter
from dendrite.dsl.node import Node
from dendrite.dsl.operations import Operations, Score
from dendrite.dsl.progress import ProgressBar
from dendrite.dsl.records import Budget
from dendrite.dsl.result import Result
from dendrite.dsl.run import Run
from dendrite.dsl.search import Search
from dendrite.dsl.search_loop import SearchLoop
from dendrite.dsl.states import fits
from dendrite.dsl.strategies.base import Strategy
from dendrite.dsl.types import OnError, Prompt, S, is_prompt
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
        self._on_error: OnError = on_error
        self._merge = merge
        lowered = lower(parts, strategy, on_error=on_error, merge=merge, names=names or {})
        self._operations = lowered.operations
        self._state_type = lowered.state
        self._names = names or {}

    @property
    def operations(self) -> Operations:
        """The tree operations it compiled to; the search loop executes exactly these."""
        return self._operations

    def explain(self) -> str:
        """The tree operations as text."""
        return explained(self._operations, on_error=self._on_error)

    def replace(self, *, strategy: Strategy) -> Program[S]:
        """The same program under another strategy, checked anew."""
        return Program(self._parts, strategy, on_error=self._on_error, merge=self._merge, names=self._names)

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
        loop = self._begin(on, prompt, state=state, seed=seed, budget=budget, journal=journal)
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
        loop = self._reopen(Path(path), on, budget)
        with Waiter() as waiter:
            return waiter.wait(self._drained(loop))

    async def aresume(
        self, path: PathLike[str] | str, on: Engine | Branch, *, budget: Budget | None = None
    ) -> Result[S]:
        """`resume` for asyncio."""
        return await self._drained(self._reopen(Path(path), on, budget))

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
        loop = self._begin(on, prompt, state=state, seed=seed, budget=budget, journal=journal)
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
        return cast(
            "Generator[Event[S]]", iterated(self._begin(on, prompt, state=state, seed=seed, budget=budget).events())
        )

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
        return cast("AsyncGenerator[Event[S]]", self._begin(on, prompt, state=state, seed=seed, budget=budget).events())

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
        seed = random.getrandbits(53) if seed is None else seed
        loop = self._begin(on, prompt, state=state, seed=seed, budget=budget, is_saved=True)
        return Search(loop, lambda: Codec(self._state_type))

    def reopen(self, path: PathLike[str] | str, on: Engine | Branch, *, budget: Budget | None = None) -> Search[S]:
        """A search to step by hand from its journal, or from what `Search.save` wrote; the file goes on with it.

        Its first frontier is the one that was not chosen from yet.

        Raises:
            SnapshotError: as for `resume`.
        """
        return Search(self._reopen(Path(path), on, budget), lambda: Codec(self._state_type))

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
        if concurrency < 1:
            raise ProgramError(f"map(concurrency={concurrency}) runs nothing: give 1 or more")
        turns = asyncio.Semaphore(concurrency)
        results: list[Result[S]] = []

        async def one(prompt: Prompt, state: S) -> Result[S]:
            async with turns:
                result = await self.arun(engine, prompt, state=state, seed=seed, budget=budget)
                results.append(result)
                return result

        try:
            return await together([one(prompt, state) for prompt, state in inputs])
        except BaseException:
            for result in results:
                result.close()
            raise

    def _begin(
        self,
        on: Engine | Branch,
        prompt: Prompt,
        *,
        state: S,
        seed: int | None,
        budget: Budget | None,
        journal: PathLike[str] | str | None = None,
        is_saved: bool = False,
    ) -> SearchLoop:
        """Check the arguments and set a search up; nothing is run and nothing made yet."""
        if not is_prompt(prompt):
            raise ProgramError(f"the prompt is {prompt!r}: give text, or a list of messages with role and content")
        self._check_state(state)
        engine, origin = _engine_of(on)
        log: Log | None = None
        if journal is not None or is_saved:
            seed = random.getrandbits(53) if seed is None else seed
            header = functools.partial(self._header, engine, origin, prompt, state=state, seed=seed, budget=budget)
            log = Log(header, file=create(Path(journal), header(), Codec(self._state_type)) if journal else None)
        return self._loop_for(engine, origin, prompt, state=state, seed=seed, budget=budget, log=log)

    def _loop_for(
        self,
        engine: Engine,
        origin: Branch | None,
        prompt: Prompt,
        *,
        state: S,
        seed: int | None,
        budget: Budget | None,
        log: Log | None,
    ) -> SearchLoop:
        loop = self._operations[1]
        run = Run(
            engine,
            seed=seed,
            meter=Meter(engine, budget),
            on_error=self._on_error,
            scores=[operation for operation in loop.body if isinstance(operation, Score)],
            wants_logprobs=loop.strategy.wants_logprobs,
        )
        return SearchLoop(self._operations, run, origin=origin, prompt=prompt, state=state, log=log)

    def _header(
        self,
        engine: Engine,
        origin: Branch | None,
        prompt: Prompt,
        *,
        state: S,
        seed: int | None,
        budget: Budget | None,
    ) -> dict[str, Any]:
        """The first line of a journal: what must not change, and what the search was started with."""
        codec = Codec(self._state_type)
        return self._identity(engine, origin) | {
            "seed": seed,
            "prompt": prompt,
            "root": codec.dump(state),
            "budget": None if budget is None else asdict(budget),
        }

    def _identity(self, engine: Engine, origin: Branch | None) -> dict[str, Any]:
        """What must be the same where a journal is gone on from."""
        loop = self._operations[1]
        options = [
            [source.cue, source.width, asdict(source.sampling), source.prior, source.function is not None]
            for source in loop.sources
        ]
        return {
            "journal": VERSION,
            "model": engine.spec.name,
            "strategy": str(loop.strategy),
            "sources": json.loads(json.dumps(options, default=str)),
            "functions": functions_of(loop),
            "state": Codec(self._state_type).schema,
            "origin": None if origin is None else _digest(origin.token_ids),
        }

    def _reopen(self, path: Path, on: Engine | Branch, budget: Budget | None) -> SearchLoop:
        """Check a journal and set its search up."""
        engine, origin = _engine_of(on)
        header, lines = read(path)
        check_same(header, self._identity(engine, origin), path)
        codec = Codec(self._state_type)
        if budget is None and header["budget"] is not None:
            budget = Budget(**header["budget"])
        log = Log(lambda: header, codec, file=Journal(path, codec), lines=lines)
        state = cast("S", codec.load(header["root"]))
        return self._loop_for(
            engine, origin, header["prompt"], state=state, seed=header["seed"], budget=budget, log=log
        )

    def _check_state(self, state: S) -> None:
        if not fits(type(state), self._state_type):
            wanted = getattr(self._state_type, "__qualname__", str(self._state_type))
            given = "none was given" if state is None else f"it was given a {type(state).__qualname__}"
            raise ProgramError(f"the program's functions take Node[{wanted}], and {given}: pass state={wanted}(...)")

    async def _drained(self, loop: SearchLoop, *, progress: bool = False) -> Result[S]:
        with ProgressBar(str(self._operations[1].strategy)) if progress else nullcontext() as bar:
            async for event in loop.events():
                if bar is not None:
                    bar.saw(event)
        assert loop.result is not None, "a search that ended without an error has its result"
        return cast("Result[S]", loop.result)

    def __repr__(self) -> str:
        return f"<Program {self._operations[1].strategy}>"


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
        on_error: what a run does about a function that raises, or about a score that is NaN or no number: "raise" ends
            it with a `CallbackError` that names function and node, "drop" drops the node and goes on.
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


def _engine_of(on: Engine | Branch) -> tuple[Engine, Branch | None]:
    from dendrite.engine.branch import Branch  # noqa: PLC0415 - whoever runs a program has loaded this; compiling must not

    if isinstance(on, Branch):
        return on.engine, on
    if not hasattr(on, "agenerate"):
        raise ProgramError(f"a program runs on an Engine or a Branch, not on {on!r}")
    return on, None


def _digest(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(repr(list(token_ids)).encode()).hexdigest()[:16]
