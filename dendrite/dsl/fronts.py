"""How synchronous code waits for the search loop, which is asynchronous: one place for all fronts."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")


class Waiter:
    """Runs coroutines to their end for synchronous code, all on one event loop of its own.

    Where this thread runs no event loop (a script, a plain thread), the coroutine runs right here, and Ctrl-C cancels
    it. Inside a running event loop (a notebook) it runs in a worker thread while this one waits.
    """

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._context = contextvars.copy_context()
        self._thread = ThreadPoolExecutor(1, "dendrite-search") if _in_event_loop() else None

    def wait(self, work: Coroutine[object, object, T]) -> T:
        """Run `work` and return what it returns; Ctrl-C cancels it and is raised once it has cleaned up."""
        if self._thread is None:
            return self._run(work)
        task: asyncio.Task[T] | None = None

        async def watched() -> T:
            nonlocal task
            task = asyncio.current_task()
            return await work

        future = self._thread.submit(self._run, watched())
        try:
            return future.result()
        except BaseException:
            if task is not None and not future.done():
                self._runner.get_loop().call_soon_threadsafe(task.cancel)
                future.exception()
            raise

    def _run(self, work: Coroutine[object, object, T]) -> T:
        try:
            return self._runner.run(work, context=self._context)
        except (KeyboardInterrupt, SystemExit):  # these leave the event loop at once, past all tasks
            self._end_tasks()
            raise

    def _end_tasks(self) -> None:
        """Let everything clean up: a second Ctrl-C is raised in whatever task runs, past those that would."""
        loop = self._runner.get_loop()
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            with suppress(KeyboardInterrupt, SystemExit):
                loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

    def close(self) -> None:
        """End the event loop; calling again is fine."""
        if self._thread is None:
            self._runner.close()
        else:
            self._thread.submit(self._runner.close).result()
            self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def iterated(items: AsyncGenerator[T]) -> Generator[T]:
    """An asynchronous generator for a synchronous `for`. Leaving the `for` early closes it."""
    with Waiter() as waiter:
        while (item := waiter.wait(_next(items))) is not None:
            try:
                yield item
            except BaseException:  # left early; when waiting fails, the generator has ended by itself
                waiter.wait(items.aclose())
                raise


async def _next(items: AsyncGenerator[T]) -> T | None:
    return await anext(items, None)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
