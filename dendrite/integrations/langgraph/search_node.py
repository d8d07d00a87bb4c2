"""A whole search as one node of an existing graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from typing import Any, Generic

from langchain_core.runnables import Runnable, RunnableLambda

from dendrite.dsl.events import Event
from dendrite.dsl.meter import Usage
from dendrite.dsl.node import Node
from dendrite.dsl.program import Program
from dendrite.dsl.records import Budget
from dendrite.dsl.result import Result, Stopped, Tree
from dendrite.dsl.types import Prompt, S
from dendrite.engine.errors import ProgramError
from dendrite.integrations.langgraph.handles import handle_of
from dendrite.integrations.langgraph.sources import EngineSource, NodeEngine, current_runtime, run_seed

Update = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Found(Generic[S]):
    """A finished search, as a node's `update` gets it: the `Result`'s parts, and handles for the graph's state."""

    result: Result[S]
    handles: Mapping[Node[S], str]

    @property
    def best(self) -> Node[S]:
        """The best node."""
        return self.result.best

    @property
    def handle(self) -> str:
        """The best branch, for the state: `open_handle`, `fork_node` and `generate_node` go on from there."""
        return self.handles[self.result.best]

    @property
    def stopped(self) -> Stopped:
        """Why it ended."""
        return self.result.stopped

    @property
    def usage(self) -> Usage:
        """What it took."""
        return self.result.usage

    @property
    def tree(self) -> Tree[S]:
        """All nodes."""
        return self.result.tree

    @property
    def branches(self) -> list[dict[str, object]]:
        """The ends of the paths that stood at the end, best first, for the state and for `pick_node`."""
        return [
            {"text": node.text, "transcript": node.transcript, "value": node.value, "handle": self.handles[node]}
            for node in self.result.leaves
            if node in self.handles
        ]


def search_node(
    program: Program[S],
    *,
    engine: EngineSource,
    prompt: Callable[[Any], Prompt],
    update: Callable[[Found[S]], Update],
    state: Callable[[Any], S] | None = None,
    seed: int | None = None,
    budget: Budget | None = None,
) -> Runnable[Any, Any]:
    """A node that runs a search program.

        graph.add_node("plan", search_node(program, engine=engine, prompt=..., update=...))

    It works in sync and async graphs. What happens in the search goes to the `custom` stream; nothing but what `update`
    returns reaches the state, or the `messages` stream. A retry searches the same way again; a cancelled node leaves
    no branch behind. The search holds no K/V once it has ended.

    Args:
        program: of `dd.compile`.
        engine: an Engine, a name, or a function of the Runtime such as `lambda runtime: runtime.context.engine`.
        prompt: from the graph's state to the search's prompt.
        update: from what was found to the node's update of the state.
        state: from the graph's state to the state of the search's root.
        seed: of every run; without it each execution has a seed of its own, the same in retries.
        budget: where to stop with what there is.

    Raises, when it runs:
        RequestError: no engine was found.
        ProgramError: `prompt` or `update` gave something else.
        CallbackError, EngineError: as for `program.run`.
    """
    source = NodeEngine(engine)

    def arguments(values: object) -> tuple[Any, dict[str, Any], _Watch]:
        runtime = current_runtime()
        given: dict[str, Any] = {"seed": run_seed(runtime) if seed is None else seed, "budget": budget}
        if state is not None:
            given["state"] = state(values)
        return source.get(runtime), {"prompt": prompt(values), **given}, _Watch(runtime.stream_writer)

    def run(values: object) -> Update:
        on, given, watch = arguments(values)
        with closing(program.stream(on, **given)) as events:
            for event in events:
                watch.see(event)
        return watch.updated(update)

    async def arun(values: object) -> Update:
        on, given, watch = arguments(values)
        async with aclosing(program.astream(on, **given)) as events:
            async for event in events:
                watch.see(event)
        return watch.updated(update)

    return RunnableLambda(run, afunc=arun, name="search")


@dataclass(slots=True)
class _Watch:
    """Tells the custom stream what happens and keeps handles of branches while they are live."""

    write: Callable[[object], None]
    handles: dict[Node[Any], str] = field(default_factory=dict)
    result: Result[Any] | None = None

    def see(self, event: Event[Any]) -> None:
        if event.kind == "done":
            self.result = event.result
            self._keep([event.node])
        elif event.kind in ("round", "goal"):
            self._keep([event.node, *event.nodes])
        self.write(_told(event))

    def updated(self, update: Callable[[Found[Any]], Update]) -> Update:
        assert self.result is not None, "a search that ended without an error has its result"
        with self.result:
            made = update(Found(self.result, self.handles))
        if not isinstance(made, Mapping):
            raise ProgramError(f"update() returned {made!r}: return a dict of the state's keys")
        return made

    def _keep(self, nodes: Sequence[Node[Any]]) -> None:
        for node in nodes:
            if node not in self.handles and node.branch.status != "pruned":
                self.handles[node] = handle_of(node.branch)


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
