"""Starting a search: the arguments of a run checked, and a loop set up for it, from the beginning or from a journal."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dendrite.dsl.codec import Codec
from dendrite.dsl.journal import VERSION, Journal, check_same, create, functions_of, read
from dendrite.dsl.log import Log
from dendrite.dsl.meter import Meter
from dendrite.dsl.operations import Operations, Score
from dendrite.dsl.records import Budget
from dendrite.dsl.run import Run
from dendrite.dsl.search_loop import SearchLoop
from dendrite.dsl.states import fits
from dendrite.dsl.types import OnError, Prompt, is_prompt
from dendrite.engine.arguments import is_whole, shortened
from dendrite.engine.errors import ProgramError

if TYPE_CHECKING:  # at run time this file must not load pydantic
    from dendrite.engine.branch import Branch
    from dendrite.engine.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a search is started with; see `Program` for what each means."""

    prompt: Prompt
    state: object
    seed: int | None
    budget: Budget | None


@dataclass(frozen=True, slots=True)
class Starter:
    """A checked program as searches are started from it."""

    operations: Operations
    state_type: object
    """The `S` of the functions' `Node[S]`; `object` where none says."""
    on_error: OnError

    @property
    def codec(self) -> Codec:
        """Writes states down and reads them; made when it is needed, for not every state can be written."""
        return Codec(self.state_type)

    def begin(
        self,
        on: Engine | Branch,
        order: Order,
        *,
        journal: PathLike[str] | str | None = None,
        is_saved: bool = False,
    ) -> SearchLoop:
        """Check the arguments and set a search up; nothing is run and nothing made yet.

        Args:
            on: what the user runs the program on.
            order: the rest of what the user gave.
            journal: where the search is written down as it goes.
            is_saved: whether it may be saved without one.

        Raises:
            ProgramError: arguments that this program cannot be run with.
        """
        if not is_prompt(order.prompt):
            raise ProgramError(
                f"the prompt is {order.prompt!r}: give text, or a list of messages with role and content"
            )
        if order.seed is not None and not is_whole(order.seed):
            raise ProgramError(f"seed={shortened(order.seed)} cannot be used: give a whole number, or None")
        _check_budget(order.budget)
        self._check_state(order.state)
        engine, origin = _engine_of(on)
        if journal is None and not is_saved:
            return self._loop(engine, origin, order)
        if order.seed is None:
            order = replace(order, seed=random.getrandbits(53))
        header = functools.partial(self._header, engine, origin, order)
        file = None if journal is None else create(path_of(journal), header(), self.codec)
        return self._loop(engine, origin, order, log=Log(header, file=file))

    def reopen(self, path: PathLike[str] | str, on: Engine | Branch, budget: Budget | None) -> SearchLoop:
        """Check a journal and set its search up.

        Raises:
            SnapshotError: see `Program.resume`.
            ProgramError: arguments that no search can be gone on with.
        """
        path = path_of(path)
        _check_budget(budget)
        engine, origin = _engine_of(on)
        header, lines, seal, file = read(path)
        try:
            check_same(header, self._identity(engine, origin), path)
            codec = self.codec
            if budget is None and header["budget"] is not None:
                budget = Budget(**header["budget"])
            log = Log(lambda: header, codec, file=Journal(file, codec, seal=seal), lines=lines)
            state = codec.load(header["root"])
            order = Order(prompt=header["prompt"], state=state, seed=header["seed"], budget=budget)
            return self._loop(engine, origin, order, log=log)
        except BaseException:
            file.close()  # and with it the lock
            raise

    def _loop(self, engine: Engine, origin: Branch | None, order: Order, *, log: Log | None = None) -> SearchLoop:
        loop = self.operations[1]
        run = Run(
            engine,
            seed=order.seed,
            meter=Meter(engine, order.budget),
            on_error=self.on_error,
            scores=[operation for operation in loop.body if isinstance(operation, Score)],
            wants_logprobs=loop.strategy.wants_logprobs,
        )
        return SearchLoop(self.operations, run, origin=origin, prompt=order.prompt, state=order.state, log=log)

    def _header(self, engine: Engine, origin: Branch | None, order: Order) -> dict[str, Any]:
        """The first line of a journal: what must not change, and what the search was started with."""
        return self._identity(engine, origin) | {
            "seed": order.seed,
            "prompt": order.prompt,
            "root": self.codec.dump(order.state),
            "budget": None if order.budget is None else asdict(order.budget),
        }

    def _identity(self, engine: Engine, origin: Branch | None) -> dict[str, Any]:
        """What must be the same where a journal is gone on from."""
        loop = self.operations[1]
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
            "state": self.codec.schema,
            "origin": None if origin is None else _digest(origin.token_ids),
        }

    def _check_state(self, state: object) -> None:
        if not fits(type(state), self.state_type):
            wanted = getattr(self.state_type, "__qualname__", str(self.state_type))
            given = "none was given" if state is None else f"it was given a {type(state).__qualname__}"
            raise ProgramError(f"the program's functions take Node[{wanted}], and {given}: pass state={wanted}(...)")


def path_of(path: object) -> Path:
    """The path of a journal.

    Raises:
        ProgramError: it is none.
    """
    if not isinstance(path, str | PathLike) or not str(path):
        raise ProgramError(f"{shortened(path)} is no path: give the name of a file")
    return Path(path)


def _check_budget(budget: object) -> None:
    if budget is not None and not isinstance(budget, Budget):
        raise ProgramError(f"budget={shortened(budget)} is no Budget: give one such as dd.Budget(tokens=1000)")


def _engine_of(on: Engine | Branch) -> tuple[Engine, Branch | None]:
    from dendrite.engine.branch import Branch  # noqa: PLC0415 - whoever runs a program has loaded this; compiling must not

    if isinstance(on, Branch):
        return on.engine, on
    if not hasattr(on, "agenerate"):
        raise ProgramError(f"a program runs on an Engine or a Branch, not on {on!r}")
    return on, None


def _digest(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(repr(list(token_ids)).encode()).hexdigest()[:16]
