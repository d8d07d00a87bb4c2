"""A search that runs once for each execution of its node: resumed or tried again, the node goes on from what was found.

    node ──► a graph of one step, `search` ──► its checkpoint, below the node's own: journal and handles
    again ─► the checkpoint has it: reopened from the journal, and nothing is computed

LangGraph's `@task` would do it but for two things: a retry gets a new task, and in a sync graph the task waits for a
thread of the pool that its own node sits in, so that as many nodes side by side as there are threads wait for ever.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypedDict

from langchain_core.runnables import RunnableLambda
from langgraph.graph import START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from dendrite.dsl.events import Event
from dendrite.dsl.node import Node
from dendrite.dsl.program import Program
from dendrite.dsl.result import Result
from dendrite.dsl.search import Search
from dendrite.dsl.types import S
from dendrite.engine.engine import Engine
from dendrite.engine.errors import ProgramError
from dendrite.integrations.langgraph.handles import handle_of
from dendrite.integrations.langgraph.sources import current_runtime

_MOST_RECENT = 64
"""Executions whose search is remembered for a retry; of those that failed and are not tried again the oldest go."""


class Record(TypedDict):
    """A search that has ended, as a checkpoint keeps it."""

    journal: str
    """Empty where a state of the user's cannot be written down; the search is then run again, with the same seed."""
    handles: dict[str, str]
    """Of the nodes that stood at the end, by id."""


@dataclass(slots=True)
class SearchOnce(Generic[S]):
    """One execution of a node: its search, which may have been run before."""

    program: Program[S]
    engine: Engine
    begin: Callable[[], Search[S]]
    write: Callable[[object], None]
    """The node's custom stream."""
    handles: dict[Node[S], str] = field(default_factory=dict)
    result: Result[S] | None = None

    def run(self) -> Record:
        """Search, telling the stream what happens."""
        with self.begin() as search, closing(search.events()) as events:
            for event in events:
                self._see(event)
            return self._record(search)

    async def arun(self) -> Record:
        """`run` for asyncio."""
        search = self.begin()
        async with aclosing(search.aevents()) as events:
            async for event in events:
                self._see(event)
        return self._record(search)

    def reopen(self, record: Record) -> None:
        """What a record says, where this execution has not searched itself."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "search.jsonl"
            path.write_text(record["journal"], encoding="utf-8")
            with self.program.reopen(path, self.engine) as search:
                self.result = search.result()
        handles = record["handles"]
        self.handles = {node: handles[str(node.id)] for node in self.result.tree if str(node.id) in handles}

    def _see(self, event: Event[S]) -> None:
        if event.kind == "done":
            self.result = event.result
            self._keep([event.node])
        elif event.kind in ("round", "goal"):
            self._keep([event.node, *event.nodes])
        self.write(_told(event))

    def _keep(self, nodes: Sequence[Node[S]]) -> None:
        for node in nodes:
            if node not in self.handles and node.branch.status != "pruned":
                self.handles[node] = handle_of(node.branch)

    def _record(self, search: Search[S]) -> Record:
        assert self.result is not None, "a search that ended without an error has its result"
        standing = {*self.result.leaves, self.result.best}
        handles = {str(node.id): handle for node, handle in self.handles.items() if node in standing}
        return Record(journal=_journal(search), handles=handles)


class Memory:
    """Runs the searches of one node, and remembers them where the node is executed again."""

    def __init__(self) -> None:
        self._recent: OrderedDict[tuple[object, ...], Record] = OrderedDict()
        builder = StateGraph(Record, context_schema=SearchOnce)
        builder.add_node("search", RunnableLambda(_run, afunc=_arun, name="search"))
        builder.add_edge(START, "search")
        self._graph: CompiledStateGraph[Any, Any, Any, Any] = builder.compile(name="search")

    def complete(self, once: SearchOnce[Any], key: tuple[object, ...]) -> Result[Any]:
        """The result of the execution `key`, searched for now or before; close it."""
        with _closed_if_it_fails(once):
            record: Any = self._recent.get(key) or self._graph.invoke(_NOTHING, context=once)
            if once.result is None and record["journal"]:
                once.reopen(record)
            elif once.result is None:
                once.run()
            return self._remembered(once, key, record)

    async def acomplete(self, once: SearchOnce[Any], key: tuple[object, ...]) -> Result[Any]:
        """`complete` for asyncio."""
        with _closed_if_it_fails(once):
            record: Any = self._recent.get(key) or await self._graph.ainvoke(_NOTHING, context=once)
            if once.result is None and record["journal"]:
                await asyncio.to_thread(once.reopen, record)
            elif once.result is None:
                await once.arun()
            return self._remembered(once, key, record)

    def forget(self, key: tuple[object, ...]) -> None:
        """The node has done what it does with the result."""
        self._recent.pop(key, None)

    def _remembered(self, once: SearchOnce[Any], key: tuple[object, ...], record: Mapping[str, Any]) -> Result[Any]:
        assert once.result is not None, "it was run or reopened"
        self._recent[key] = Record(journal=record["journal"], handles=record["handles"])
        if len(self._recent) > _MOST_RECENT:
            self._recent.popitem(last=False)
        return once.result


_NOTHING = Record(journal="", handles={})


@contextmanager
def _closed_if_it_fails(once: SearchOnce[Any]) -> Iterator[None]:
    """A result that nobody gets holds no branch."""
    try:
        yield
    except BaseException:
        if once.result is not None:
            once.result.close()
        raise


def _run(_: Record) -> Record:
    once: SearchOnce[Any] = current_runtime().context
    return once.run()


async def _arun(_: Record) -> Record:
    once: SearchOnce[Any] = current_runtime().context
    return await once.arun()


def _journal(search: Search[Any]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "search.jsonl"
        try:
            search.save(path)
        except ProgramError:
            return ""
        return path.read_text(encoding="utf-8")


def _told(event: Event[Any]) -> dict[str, object]:
    """An event as plain values, which every stream and server can carry."""
    told: dict[str, object] = {
        "type": "dendrite.search",
        "kind": event.kind,
        "node": event.node.name,
        "depth": event.node.depth,
        "text": event.node.text,
        "value": event.node.value,
    }
    if event.nodes:
        told["nodes"] = [node.name for node in event.nodes]
    if event.detail:
        told["detail"] = event.detail
    return told
