"""Scores over many nodes in one call: children wait until a batch is full, or until no more can come."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence

from dendrite.dsl.functions import OutOfBudget, answer
from dendrite.dsl.node import Node, Step
from dendrite.dsl.operations import Score
from dendrite.dsl.records import Reject
from dendrite.engine.errors import CallbackError


class Gathering:
    """One such score in one run.

    expected   nodes being expanded, children still growing       a batch goes when it is full,
    waiting    children that are ready to be scored               or when nothing is expected
    """

    def __init__(self, operation: Score) -> None:
        self._operation = operation
        self._expected: set[Hashable] = set()
        self._waiting: list[tuple[Step, asyncio.Future[object]]] = []
        self._turn = asyncio.Lock()  # batches go one after the other
        self._calls: set[asyncio.Task[None]] = set()

    def expect(self, *comers: Hashable) -> None:
        """These may bring nodes to score."""
        self._expected.update(comers)

    def leave(self, comer: Hashable) -> None:
        """This one brings no more."""
        if comer in self._expected:
            self._expected.remove(comer)
            self._go_on()

    async def score(self, step: Step) -> object:
        """What the function said of the node, in whatever batch."""
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._waiting.append((step, future))
        self.leave(step)
        self._go_on()
        return await future

    def _go_on(self) -> None:
        size = self._operation.batch
        while self._waiting and (not self._expected or (size is not None and len(self._waiting) >= size)):
            batch, self._waiting = self._waiting[:size], self._waiting[size:] if size else []
            call = asyncio.get_running_loop().create_task(self._call(batch))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _call(self, batch: list[tuple[Step, asyncio.Future[object]]]) -> None:
        batch.sort(key=lambda entry: entry[0].id)
        try:
            async with self._turn:
                said = await self._said([Node(step) for step, _ in batch])
        except BaseException as error:  # noqa: BLE001 - those who wait are told, and raise it
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), number in zip(batch, said, strict=True):
            if not future.done():
                future.set_result(number)

    async def _said(self, nodes: Sequence[Node[object]]) -> list[object]:
        """One answer a node; a failure counts for all of them."""
        function = self._operation.function
        batch = await answer(function, nodes, nodes)
        if isinstance(batch, CallbackError | OutOfBudget | Reject):
            return [batch] * len(nodes)
        scores = listed(batch)
        if scores is None or len(scores) != len(nodes):
            what = repr(batch) if scores is None else f"{len(scores)} scores for {len(nodes)} nodes"
            return [function.failed(f"returned {what}, not one number a node", nodes)] * len(nodes)
        return scores

    def close(self) -> None:
        """End what is being called."""
        for call in self._calls:
            call.cancel()


def listed(batch: object) -> list[object] | None:
    """The elements of a sequence, an array or a tensor; None for anything else."""
    try:
        return None if isinstance(batch, str) else list(batch)  # type: ignore[call-overload]  # what cannot be listed raises
    except TypeError:
        return None
