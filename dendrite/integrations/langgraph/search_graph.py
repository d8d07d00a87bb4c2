"""A search as a graph of its own: one superstep a round, its state as JSON in a channel.

START ──► round ──┐        each superstep: reopen the journal, choose, expand, score, write the journal down
            ▲─────┘        so that every round is durable, visible in the state, and a place to stop at
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypedDict

from langchain_core.runnables import RunnableLambda
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from dendrite.dsl.events import Event
from dendrite.dsl.fronts import Waiter
from dendrite.dsl.node import Node
from dendrite.dsl.program import Program
from dendrite.dsl.records import Budget
from dendrite.dsl.types import Prompt
from dendrite.engine.engine import Engine
from dendrite.integrations.langgraph.handles import handle_of
from dendrite.integrations.langgraph.sources import EngineSource, NodeEngine, current_runtime, run_seed


class SearchState(TypedDict, total=False):
    """The channels of a search. A graph around it shares the keys it has as well."""

    prompt: Prompt
    """What the search is about: text is a user's turn, messages are a chat."""
    journal: str
    """The search so far, a line of JSON for each thing that was told."""
    rounds: int
    frontier: list[dict[str, object]]
    """The scored steps that the next round chooses from, best first: name, text, value."""
    best: dict[str, object]
    """Once the search has ended: text, transcript, value and handle of the best step."""


def search_graph(
    program: Program[Any],
    *,
    engine: EngineSource,
    seed: int | None = None,
    budget: Budget | None = None,
    checkpointer: Any = None,  # noqa: ANN401 - LangGraph takes savers and booleans
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """A graph that runs a program round by round: as a node of another graph, or alone.

    A round is what lies between two frontiers; a strategy that offers none, one that takes a node at a time, is one.
    Between rounds the search holds no K/V: the next one begins on what the engine has cached. With
    `interrupt_after=["round"]` or a breakpoint of your own it stops after each round and goes on where it was.

    Args:
        program: of `dd.compile`, without a state of the user's at its root.
        engine: an Engine, a name, or a function of the Runtime.
        seed: of every run; without it each has its own.
        budget: where to stop with what there is.
        checkpointer: as for `StateGraph.compile`.

    Raises, when it runs:
        SnapshotError: the channel's journal is of another model or program.
        RequestError, CallbackError, EngineError: as for `search_node`.
    """
    source = NodeEngine(engine)

    async def advance(state: SearchState, on: Engine, drawn: int) -> SearchState:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "search.jsonl"
            rounds = state.get("rounds", 0)
            if rounds:
                path.write_text(state["journal"], encoding="utf-8")
                search = program.reopen(path, on)
            else:
                search = program.start(on, state.get("prompt", ""), seed=drawn, budget=budget)
            async with aclosing(search.aevents()) as events:
                event = await _next_round(events, 1 if rounds else 0)
                if event.result is None and not rounds:
                    search.save(path)
                update = _told(event, rounds + 1)
            update["journal"] = path.read_text(encoding="utf-8") if path.exists() else ""
            return update

    def run(state: SearchState) -> SearchState:
        runtime = current_runtime()
        drawn = run_seed(runtime) if seed is None else seed
        with Waiter() as waiter:
            return waiter.wait(advance(state, source.get(runtime), drawn))

    async def arun(state: SearchState) -> SearchState:
        runtime = current_runtime()
        return await advance(state, source.get(runtime), run_seed(runtime) if seed is None else seed)

    builder = StateGraph(SearchState)
    builder.add_node("round", RunnableLambda(run, afunc=arun, name="round"))
    builder.add_edge(START, "round")
    builder.add_conditional_edges("round", lambda state: "round" if state["frontier"] else END, ["round", END])
    return builder.compile(checkpointer=checkpointer)


async def _next_round(events: AsyncGenerator[Event[Any]], num_seen: int) -> Event[Any]:
    """The next frontier that is not one of the first `num_seen`, or the end of the search."""
    async for event in events:
        if event.kind == "frontier":
            if not num_seen:
                return event
            num_seen -= 1
        if event.kind == "done":
            return event
    raise AssertionError("a search ends with the event `done`")


def _told(event: Event[Any], rounds: int) -> SearchState:
    """What the channels are told of a frontier, or of the end."""
    if event.result is None:
        return SearchState(rounds=rounds, frontier=[_shown(node) for node in event.nodes])
    with event.result as result:
        best = result.best
        shown = {**_shown(best), "transcript": best.transcript, "handle": handle_of(best.branch)}
        return SearchState(rounds=rounds, frontier=[], best=shown)


def _shown(node: Node[Any]) -> dict[str, object]:
    return {"name": node.name, "text": node.text, "value": node.value}
