"""A user's function inside a program: what it is called, where it stands, and how it is run.

Synchronous functions are called directly, on the thread that runs the search, and never in one of their own: a busy
Python thread beside a step on the CPU slows the step. Asynchronous ones run together on the caller's event loop.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from dendrite.dsl.node import Node
from dendrite.dsl.records import Reject
from dendrite.engine.errors import CallbackError, DendriteError

T = TypeVar("T")


class OutOfBudget(BaseException):
    """The budget ended in `Node.ask`. Not an Exception, so that a user's `except Exception` does not eat it."""


@dataclass(frozen=True, slots=True)
class Function:
    """One decorated function and what a message about it needs."""

    call: Callable[..., object]
    name: str
    file: str
    line: int
    is_async: bool

    @classmethod
    def of(cls, call: Callable[..., object]) -> Function:
        """Look at a function, a bound method, a partial or a callable object."""
        inner = plain(call)
        code = getattr(inner, "__code__", None)
        return cls(
            call=call,
            name=getattr(inner, "__qualname__", type(call).__name__).rpartition("<locals>.")[2],
            file=code.co_filename if code else "unknown file",
            line=code.co_firstlineno if code else 0,
            is_async=inspect.iscoroutinefunction(inner),
        )

    @property
    def place(self) -> str:
        """`name (path/to/file.py:12)`, as error messages give it."""
        return f"{self.name} ({self.file}:{self.line})"

    @property
    def label(self) -> str:
        """`name, file.py:12`, as `explain()` gives it: the same on every machine."""
        return f"{self.name}, {Path(self.file).name}:{self.line}"

    async def run(self, argument: object, nodes: Sequence[Node[object]]) -> object:
        """Call it and await it if need be.

        Args:
            argument: what it is called with.
            nodes: the nodes that an error message names.

        Raises:
            CallbackError: it raised; the cause is chained. Errors of this package pass as they are.
        """
        try:
            result = self.call(argument)
            return await cast("Awaitable[object]", result) if inspect.isawaitable(result) else result
        except (DendriteError, Reject):
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancels the search: something that the function awaited was cancelled.
            raise self.failed("was cancelled from within", nodes) from error
        except Exception as error:
            raise self.failed(f"raised {type(error).__name__}: {error}", nodes) from error

    def failed(self, what: str, nodes: Sequence[Node[object]]) -> CallbackError:
        """The error that says what this function did and on which node."""
        return CallbackError(
            f"{self.place} {what}, on {named(nodes)}. "
            'Mend the function, or compile the program with on_error="drop" to drop such nodes'
        )


def plain(call: Callable[..., object]) -> Callable[..., object]:
    """The function under bound methods, partials, `functools.wraps` and callable objects."""
    while True:
        if isinstance(call, functools.partial):
            call = call.func
        elif inspect.ismethod(call):
            call = call.__func__
        elif hasattr(call, "__wrapped__"):
            call = call.__wrapped__
        elif not inspect.isroutine(call) and not isinstance(call, type):
            call = type(call).__call__
        else:
            return call


def named(nodes: Sequence[Node[object]]) -> str:
    """Which nodes, by their place in the tree and their text."""
    if len(nodes) != 1:
        return f"nodes {', '.join(node.name for node in nodes[:5])}{' …' if len(nodes) > 5 else ''}"
    text = nodes[0].text
    return f"node {nodes[0].name} ({text[:60]!r}{'…' if len(text) > 60 else ''})"


async def answer(function: Function, argument: object, nodes: Sequence[Node[object]]) -> object:
    """`function.run`, where a failure of the function is an answer too."""
    try:
        return await function.run(argument, nodes)
    except (CallbackError, Reject, OutOfBudget) as failure:
        return failure


async def together(coroutines: Iterable[Coroutine[object, object, T]]) -> list[T]:
    """Run coroutines at the same time; results in order. The first failure cancels the others and is raised."""
    async with joined() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
    return [task.result() for task in tasks]


@asynccontextmanager
async def joined() -> AsyncGenerator[asyncio.TaskGroup]:
    """A task group whose first failure is raised as it is."""
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        failure = failures.exceptions[0]
    if failure is not None:
        raise failure  # out here, so that its own cause stays what it was
