"""A call that was handed in and not yet waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from dendrite.engine.loop import StepLoop
from dendrite.engine.requests import Group

T = TypeVar("T")


class Ticket(Generic[T]):
    """Stands for the results of one call; every front waits for one of these in its own way."""

    def __init__(self, loop: StepLoop, group: Group, read: Callable[[], T]) -> None:
        self._loop = loop
        self._group = group
        self._read = read

    def wait(self) -> T:
        """Block until the results are there; whatever ends the waiting, such as Ctrl-C, cancels the call."""
        try:
            self._group.wait()
        except BaseException:
            self.cancel()
            raise
        else:
            return self._read()
        finally:
            del self  # an error's traceback names this frame, and the group has the error: a cycle would hold branches

    async def result(self) -> T:
        """`wait` for asyncio; cancelling the task cancels the call at once, and every branch of it rolls back."""
        try:
            await asyncio.wrap_future(self._group.future)
        except BaseException:
            self.cancel()
            raise
        else:
            return self._read()
        finally:
            del self  # an error's traceback names this frame, and the group has the error: a cycle would hold branches

    def cancel(self) -> None:
        """End the call; its branches are as they were before it. Nothing happens if it ended already."""
        self._loop.cancel(self._group)
