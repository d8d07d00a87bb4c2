"""A whole search as one node of an existing graph."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic

from langchain_core.runnables import Runnable, RunnableLambda
from langgraph.types import Command

from dendrite.dsl.meter import Usage
from dendrite.dsl.node import Node
from dendrite.dsl.program import Program
from dendrite.dsl.records import Budget
from dendrite.dsl.result import Result, Stopped, Tree
from dendrite.dsl.types import Prompt, S
from dendrite.engine.errors import ProgramError
from dendrite.integrations.langgraph.search_once import Memory, SearchOnce
from dendrite.integrations.langgraph.sources import EngineSource, NodeEngine, current_runtime, run_path, run_seed

Update = Mapping[str, object] | Command[Any]
"""What a node returns: keys of the state, or a Command that also says where the graph goes on."""


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
    returns reaches the state, or the `messages` stream. The search runs once: a retry of what fails in `update`, and
    the resumption of an `interrupt()` there, also in another process, reopen what was found. A cancelled node leaves
    no branch behind. The search holds no K/V once it has ended.

    Args:
        program: of `dd.compile`.
        engine: an Engine, a name, or a function of the Runtime such as `lambda runtime: runtime.context.engine`.
        prompt: from the graph's state to the search's prompt.
        update: from what was found to the node's update of the state, or to a `Command` with one.
        state: from the graph's state to the state of the search's root.
        seed: of every run; without it each execution has a seed of its own, the same in retries.
        budget: where to stop with what there is.

    Raises, when it runs:
        RequestError: no engine was found.
        ProgramError: `prompt` or `update` gave something else.
        CallbackError, EngineError: as for `program.run`.
    """
    node = _SearchNode(program, NodeEngine(engine), prompt, update, state, seed, budget)
    return RunnableLambda(node.run, afunc=node.arun, name="search")


@dataclass(frozen=True, slots=True)
class _SearchNode(Generic[S]):
    """The node: it searches once an execution, since `memory` has what was found until its update has been made."""

    program: Program[S]
    engine: NodeEngine
    prompt: Callable[[Any], Prompt]
    update: Callable[[Found[S]], Update]
    state: Callable[[Any], S] | None
    seed: int | None
    budget: Budget | None
    memory: Memory = field(default_factory=Memory)

    def run(self, values: object) -> Update:
        """The node in a sync graph."""
        once, key = self._begun(values)
        made = self._updated(once, self.memory.complete(once, key))
        self.memory.forget(key)
        return made

    async def arun(self, values: object) -> Update:
        """The node in an async graph."""
        once, key = self._begun(values)
        made = self._updated(once, await self.memory.acomplete(once, key))
        self.memory.forget(key)
        return made

    def _begun(self, values: object) -> tuple[SearchOnce[S], tuple[object, ...]]:
        runtime = current_runtime()
        given: dict[str, Any] = {"seed": run_seed(runtime) if self.seed is None else self.seed, "budget": self.budget}
        if self.state is not None:
            given["state"] = self.state(values)
        engine, prompt = self.engine.get(runtime), self.prompt(values)
        here = contextvars.copy_context()  # where the stream's writer knows which node it is of

        def write(event: object) -> None:
            here.run(runtime.stream_writer, event)

        once = SearchOnce(self.program, engine, lambda: self.program.start(engine, prompt, **given), write)
        return once, run_path(runtime)

    def _updated(self, once: SearchOnce[S], result: Result[S]) -> Update:
        with result:
            made = self.update(Found(result, once.handles))
        if not isinstance(made, Mapping | Command):
            raise ProgramError(f"update() returned {made!r}: return a dict of the state's keys, or a Command")
        return made
