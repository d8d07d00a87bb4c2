"""A node's search runs once, whatever happens to the node after it: retries, interrupts, another process."""

import operator
from collections.abc import Iterator
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt

import dendrite as dd
from dendrite.engine.engine import Engine
from dendrite.integrations.langgraph import Found, TimeTravelSaver, open_handle, search_node
from dendrite.testing import scripted_engine

PROGRAM_WIDTH = 3


@dd.score
def large(node: dd.Node) -> float:
    return float(node.text)


program = dd.compile(
    dd.expand(cue="\nAdd:", width=PROGRAM_WIDTH, stop="\n"), large, dd.prune(keep=2), strategy=dd.Beam(2)
)


class State(TypedDict, total=False):
    branches: Annotated[list[str], operator.add]
    texts: Annotated[list[str], operator.add]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with scripted_engine(lambda text: [" 1", " 2", " 3"]) as engine:
        yield engine
        engine.check_integrity()


def graph_of(engine: Engine, update: Any, *, saver: Any = None, program: Any = program, **options: Any) -> Any:
    builder = StateGraph(State)
    node = search_node(program, engine=engine, prompt=lambda state: "Count.", update=update, **options)
    builder.add_node("search", node, retry_policy=RetryPolicy(max_attempts=3, initial_interval=0.0, jitter=False))
    builder.add_edge(START, "search")
    return builder.compile(checkpointer=saver)


def told(found: Found[Any]) -> dict[str, object]:
    return {"branches": [leaf["handle"] for leaf in found.branches], "texts": [found.best.transcript]}


def sampled(engine: Engine) -> int:
    return engine.stats().tokens_sampled


def thread(name: str) -> Any:
    return {"configurable": {"thread_id": name}}


@pytest.mark.parametrize("saver", [None, InMemorySaver()], ids=["alone", "with a saver"])
async def test_a_retry_does_not_search_again(engine: Engine, saver: Any) -> None:
    """`update` fails twice; the third time it gets what was found, and so many tokens were sampled as by one search."""
    seen: list[dict[str, object]] = []

    def flaky(found: Found[Any]) -> dict[str, object]:
        seen.append(told(found))
        if len(seen) % 3:
            raise dd.OutOfBlocks(1, 0, 0)
        return told(found)

    with program.run(engine, "Count.", seed=5):
        once = sampled(engine)
    graph = graph_of(engine, flaky, saver=saver, seed=5)
    state = graph.invoke({}, thread("sync"))
    assert sampled(engine) == 2 * once
    assert seen[0] == seen[1] == seen[2] == state
    assert await graph.ainvoke({}, thread("async")) == state
    assert sampled(engine) == 3 * once
    assert engine.stats().branches == 0


async def test_an_interrupt_after_the_search_does_not_search_again(engine: Engine) -> None:
    """A human picks inside the node, and once more; events are told once, too."""

    def ask(found: Found[Any]) -> dict[str, object]:
        texts = [leaf["text"] for leaf in found.branches]
        picked = interrupt(texts)
        if not interrupt("sure?"):
            return {}
        return {"texts": [texts[picked]], "branches": [found.branches[picked]["handle"]]}

    graph = graph_of(engine, ask, saver=InMemorySaver())
    (asked,) = graph.invoke({}, thread("1"))["__interrupt__"]
    assert len(asked.value) == 2
    before = sampled(engine)
    assert not list(graph.stream(Command(resume=1), thread("1"), stream_mode="custom"))
    state = await graph.ainvoke(Command(resume=True), thread("1"))
    assert sampled(engine) == before
    assert state["texts"] == [asked.value[1]]
    with open_handle(engine, state["branches"][0]) as branch:
        assert branch.text.endswith(asked.value[1])
    graph.invoke({}, thread("1"))  # a new run is a new search
    assert sampled(engine) > before


@pytest.mark.parametrize("is_async", [False, True])
async def test_another_process_goes_on_from_what_was_found(engine: Engine, is_async: bool) -> None:
    """The record is in the checkpoint: nothing is sampled there, and the handles are the same."""

    def ask(found: Found[Any]) -> dict[str, object]:
        return told(found) if interrupt("go on?") else {}

    saver = TimeTravelSaver(InMemorySaver(), engine)
    first = graph_of(engine, ask, saver=saver)
    _ = await first.ainvoke({}, thread("1")) if is_async else first.invoke({}, thread("1"))
    with scripted_engine(lambda text: [" 9"]) as restarted:
        second = graph_of(restarted, ask, saver=saver)
        go: Any = Command(resume=True)
        state = await second.ainvoke(go, thread("1")) if is_async else second.invoke(go, thread("1"))
        assert len(state["branches"]) == 2
        assert " 9" not in state["texts"][0]
        assert sampled(restarted) == restarted.stats().branches == 0


def test_a_search_that_cannot_be_written_down_is_run_again() -> None:
    """Its state is no plain value; the retry has the same seed, and finds the same."""

    @dd.observe
    def keep(step: dd.Node) -> dd.Outcome:
        return dd.Outcome(object())

    odd = dd.compile(dd.expand(cue="\nAdd:", width=2, stop="\n"), keep, large, strategy=dd.Beam(1))
    found: list[dict[str, object]] = []

    def flaky(result: Found[Any]) -> dict[str, object]:
        found.append(told(result))
        if len(found) == 1:
            raise dd.OutOfBlocks(1, 0, 0)
        return told(result)

    with scripted_engine(lambda text: [" 1", " 2", " 3"]) as engine:
        graph_of(engine, flaky, program=odd, state=lambda values: None).invoke({})
        assert found[0] == found[1]
        assert engine.stats().branches == 0


def test_searches_side_by_side_do_not_wait_for_each_other(engine: Engine) -> None:
    """More of them than the graph has threads."""
    builder = StateGraph(State)
    builder.add_node("search", search_node(program, engine=engine, prompt=lambda state: "Count.", update=told))
    builder.add_conditional_edges(START, lambda state: [Send("search", {}) for _ in range(6)], ["search"])
    graph: Any = builder.compile(checkpointer=InMemorySaver())
    state = graph.invoke({}, {**thread("1"), "max_concurrency": 2})
    assert len(state["texts"]) == 6
