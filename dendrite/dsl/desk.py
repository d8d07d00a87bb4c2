"""Where a run's requests to the engine are handed in: those of one turn of the event loop start in the same step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # at run time this file must not load pydantic
    from dendrite.dsl.node import Sampling
    from dendrite.engine.branch import Branch
    from dendrite.engine.engine import Engine
    from dendrite.engine.generation import Generation
    from dendrite.engine.ticket import Ticket

T = TypeVar("T")


class Desk:
    """Collects what is asked for and hands it in when the event loop comes round.

    child 1 ─┐                       handed in one by one, the first would get a step of its own
    child 2 ─┼─ one flush ──► engine: one step
    score   ─┘
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: list[tuple[Callable[[], Ticket[Any]], asyncio.Future[Ticket[Any]]]] = []

    async def generate(
        self, branch: Branch, sampling: Sampling, *, priority: float = 0.0, logprobs: bool = False
    ) -> Generation:
        """Generate onto a branch; with `logprobs`, tokens that a constraint forces have theirs too."""
        if sampling.constraint is not None:
            await self._engine.prepare(sampling.constraint)  # not while the engine waits for what is handed in
        (generation,) = await self._hand_in(
            lambda: self._engine.submit(
                [branch],
                priority=priority,
                max_tokens=sampling.max_tokens,
                stop=sampling.stop,
                temperature=sampling.temperature,
                constraint=sampling.constraint,
                fast_forward=not logprobs,
            )
        )
        return generation

    async def score(self, branch: Branch, choices: Sequence[str], *, priority: float = 0.0) -> list[list[float]]:
        """The log-probability of each token of each choice."""
        return await self._hand_in(lambda: self._engine.submit_score(branch, choices, priority=priority))

    async def _hand_in(self, submit: Callable[[], Ticket[T]]) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Ticket[T]] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting.append((submit, future))
        try:
            ticket = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not future.exception():
                future.result().cancel()  # handed in, and cancelled before anybody waited for it
            raise
        return await ticket.result()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        with self._engine.together():
            for submit, future in waiting:
                if future.cancelled():
                    continue
                try:
                    future.set_result(submit())
                except Exception as error:  # noqa: BLE001 - whoever handed it in is told
                    future.set_exception(error)
