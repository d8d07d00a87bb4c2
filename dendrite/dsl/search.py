"""One search, stepped by hand."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Generic, Self, cast

from dendrite.dsl.codec import Codec
from dendrite.dsl.events import Event
from dendrite.dsl.fronts import iterated
from dendrite.dsl.node import Node
from dendrite.dsl.result import Result
from dendrite.dsl.search_loop import SearchLoop
from dendrite.dsl.starting import path_of
from dendrite.dsl.types import S
from dendrite.engine.errors import ProgramError


class Search(Generic[S]):
    """One run in progress: step it, look at it, choose who goes on.

        search = program.start(engine, "Plan:")
        for frontier in search:                      # scored children, best first
            search.keep([frontier[int(input())]])    # without this the program's own choice stands
        print(search.result().best.transcript)

    Made by `Program.start`. A search that is left half-way keeps its branches until `close`, which the end of a `with`
    calls too.
    """

    def __init__(self, loop: SearchLoop, codec_of: Callable[[], Codec]) -> None:
        self._loop = loop
        self._codec_of = codec_of
        self._events = iterated(loop.events())
        self._frontier: Sequence[Node[S]] = ()

    def __iter__(self) -> Iterator[Sequence[Node[S]]]:
        for event in self._events:
            if event.kind == "frontier":
                self._frontier = cast("Sequence[Node[S]]", event.nodes)
                yield self._frontier
                self._frontier = ()

    def events(self) -> Generator[Event[S]]:
        """What happens, as `Program.stream` tells it, in place of stepping by hand; the last event has the result."""
        return cast("Generator[Event[S]]", self._events)

    def aevents(self) -> AsyncGenerator[Event[S]]:
        """`events` for asyncio. Wrap it in `contextlib.aclosing` where the loop may be left early."""
        return cast("AsyncGenerator[Event[S]]", self._loop.events())

    def keep(self, nodes: Sequence[Node[S]]) -> None:
        """Choose the survivors of the frontier that was yielded last, best first.

        Raises:
            ProgramError: no frontier is out, or a node is not of it or given twice. Nothing was changed.
        """
        if not self._frontier:
            raise ProgramError("keep() chooses among the frontier that the loop yielded: call it inside the for loop")
        if not _are_nodes(nodes) or len(set(nodes)) < len(nodes) or not set(nodes) <= set(self._frontier):
            raise ProgramError("keep() takes a list of nodes of this frontier, each at most once")
        self._loop.choose([node.id for node in nodes])

    def cancel(self) -> None:
        """End before the next round; `result()` is then what there is, with `stopped == "cancelled"`."""
        self._loop.is_cancelled = True

    def result(self) -> Result[S]:
        """The result, after running whatever is left of the search with the program's own choices."""
        for _ in self._events:
            pass
        if self._loop.result is None:
            raise ProgramError("this search was closed before it ended: start another")
        return cast("Result[S]", self._loop.result)

    def save(self, path: PathLike[str] | str) -> None:
        """Write the search down as it stands, to go on from with `program.resume(path, engine)`, at any later time.

        Raises:
            ProgramError: there is a file at the path, or a state that cannot be written down. Nothing was written.
        """
        self._loop.save(path_of(path), self._codec_of())

    def close(self) -> None:
        """End the search here and prune what it made, unless it has its result; calling again is fine."""
        self._events.close()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _are_nodes(nodes: object) -> bool:
    return isinstance(nodes, Sequence) and all(isinstance(node, Node) for node in nodes)
