"""What users get wrong has an error of its own, which says what to do, and leaves nothing behind."""

import json
import zlib
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import RetryPolicy

import dendrite as dd
from dendrite.dsl.seals import sealed
from dendrite.engine.engine import Engine
from dendrite.engine.errors import (
    BranchError,
    ConstraintError,
    ContextOverflow,
    EngineClosed,
    RequestError,
    SnapshotError,
)
from dendrite.integrations.langchain import ChatDendrite
from dendrite.integrations.langgraph import fork_node, generate_node, handle_of, score_node, search_graph, search_node
from dendrite.integrations.langgraph.handles import Reference, Snapshot, _digest
from dendrite.testing import scripted_engine


class State(TypedDict, total=False):
    branch: str
    branches: list[Any]
    texts: list[str]
    scores: list[float]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with scripted_engine(lambda text: [" 1", " 2"], context_length=400) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats().branches == 0


def graph_of(node: Any, runs: list[int] | None = None) -> Any:
    def counted(state: State) -> dict[str, object]:
        (runs if runs is not None else []).append(1)
        return {}

    builder = StateGraph(State)
    builder.add_node("count", counted)
    builder.add_node("node", node, retry_policy=RetryPolicy(initial_interval=0.0, jitter=False))
    builder.add_edge(START, "count")
    builder.add_edge("count", "node")
    return builder.compile()


def forged(packed: bytes, draw: str = "0") -> str:
    """A handle whose digest is right and whose content is not."""
    body = f"dendrite:1:scripted:{draw}:{urlsafe_b64encode(packed).decode()}"
    return f"{body}:{_digest(body.encode(), 6)}"


STALE = str(Reference("scripted", 32 * "a", 7))
FOREIGN = Snapshot("llama-3.1-8b", (1, 2, 3), 0).handle()
LONG = Snapshot("scripted", (65,) * 500, 0).handle()
UNKNOWN = Snapshot("scripted", (10**6,), 0).handle()
BOMB = forged(zlib.compress(bytes(2**24 + 4), 9))

NODES: list[Callable[[Engine], Any]] = [
    lambda engine: generate_node(engine=engine, max_tokens=2),
    lambda engine: score_node(dd.Choice({"yes": 1.0, "no": 0.0}), engine=engine),
]


@pytest.mark.parametrize("make", NODES, ids=["generate", "score"])
@pytest.mark.parametrize(
    "handle, error, says",
    [
        (STALE, BranchError, "stale.*through that saver"),
        (FOREIGN, BranchError, r"'llama-3.1-8b'.*engine with that model"),
        ("branch 7", BranchError, "no handle"),
        (7, BranchError, "no handle"),
        ({"text": "a"}, BranchError, "no handle"),
        (forged(b"nothing"), BranchError, "damaged"),
        (forged(zlib.compress(b"abc")), BranchError, "damaged"),
        (forged(zlib.compress(b"abcd"), draw="x"), BranchError, "damaged"),
        (BOMB, BranchError, "damaged"),
        (LONG, ContextOverflow, "context holds"),
        (UNKNOWN, RequestError, "out of range"),
    ],
    ids=[
        "stale",
        "foreign",
        "text",
        "number",
        "dict",
        "noise",
        "short",
        "no draw",
        "bomb",
        "too long",
        "unknown token",
    ],
)
async def test_a_wrong_handle_in_the_state(
    engine: Engine, make: Callable[[Engine], Any], handle: Any, error: type[Exception], says: str
) -> None:
    """A node says so, opens none of the others, and is not tried again."""
    with engine.root("Count.") as root:
        good = handle_of(root)
    runs: list[int] = []
    graph = graph_of(make(engine), runs)
    with pytest.raises(error, match=says):
        graph.invoke({"branches": [good, handle]})
    with pytest.raises(error, match=says):
        await graph.ainvoke({"branches": [good, handle]})
    assert len(runs) == 2
    assert engine.stats().branches == 0


def test_a_wrong_handle_to_fork(engine: Engine) -> None:
    """It is read before anything is made of it."""
    with pytest.raises(BranchError, match="stale"):
        graph_of(fork_node(2, engine=engine)).invoke({"branch": STALE})
    with pytest.raises(RequestError, match="prompt="):
        graph_of(fork_node(2, engine=engine)).invoke({})


@dd.score
def large(node: dd.Node) -> float:
    return float(node.text)


program = dd.compile(dd.expand(cue="\nAdd:", width=2, stop="\n"), large, strategy=dd.Beam(2))


def resealed(journal: str) -> str:
    seal, written = "", b""
    for line in map(json.loads, journal.splitlines()):
        del line["seal"]
        one, seal = sealed(line, seal)
        written += one
    return written.decode()


async def test_a_search_of_another_model(engine: Engine) -> None:
    """A journal in the state that another model wrote is not gone on from."""
    graph = search_graph(program, engine=engine, checkpointer=InMemorySaver())
    thread: Any = {"configurable": {"thread_id": "1"}}
    state = graph.invoke({"prompt": "Count."}, thread, interrupt_after=["round"])
    journal = resealed(state["journal"].replace('"scripted"', '"llama-3.1-8b"'))
    changed = graph.update_state(thread, {"journal": journal})
    with pytest.raises(SnapshotError, match="the model llama"):
        graph.invoke(None, changed)
    with pytest.raises(SnapshotError, match="the model llama"):
        await graph.ainvoke(None, changed)


class Context(TypedDict):
    engine: Engine


@pytest.mark.parametrize("kind", ["search", "fork", "generate", "score"])
def test_no_engine_in_the_context(engine: Engine, kind: str) -> None:
    """Every node says that `context=` was forgotten; one that was closed says that."""
    with engine.root("Count.") as root:
        good = handle_of(root)

    def found(runtime: Any) -> Engine:
        held: Engine = runtime.context["engine"]
        return held

    nodes: dict[str, Any] = {
        "search": search_node(program, engine=found, prompt=lambda state: "Count.", update=lambda found: {}),
        "fork": fork_node(2, engine=found, prompt=lambda state: "Count."),
        "generate": generate_node(engine=found, max_tokens=2),
        "score": score_node(dd.Choice({"yes": 1.0, "no": 0.0}), engine=found),
    }
    builder = StateGraph(State, context_schema=Context)
    builder.add_node("node", nodes[kind])
    builder.add_edge(START, "node")
    graph: Any = builder.compile()
    assert graph.invoke({"branches": [good]}, context={"engine": engine})
    with pytest.raises(RequestError, match="context="):
        graph.invoke({"branches": [good]})
    with scripted_engine(lambda text: " 1") as closed:
        closed.close()
        with pytest.raises(EngineClosed):
            graph.invoke({"branches": [good]}, context={"engine": closed})


async def test_what_a_chat_model_cannot_do(engine: Engine) -> None:
    """A tool schema that cannot be compiled, an image, a stream of several answers; sync and async."""
    odd = {
        "name": "odd",
        "description": "Odd.",
        "parameters": {"type": "object", "properties": {"a": {"type": "blob"}}},
    }
    image = [HumanMessage([{"type": "text", "text": "What is it?"}, {"type": "image", "url": "file:cat.png"}])]
    with ChatDendrite(engine=engine) as chat:
        with pytest.raises(ConstraintError, match="'odd'"):
            chat.bind_tools([odd])
        with pytest.raises(ConstraintError, match="'odd'"):
            await chat.ainvoke("Say.", tools=[{"type": "function", "function": odd}])
        with pytest.raises(RequestError, match="text only"):
            chat.invoke(image)
        with pytest.raises(RequestError, match="text only"):
            await chat.ainvoke(image)
        with pytest.raises(RequestError, match=r"n=2.*generate"):
            list(chat.stream("Say.", n=2))
        with pytest.raises(RequestError, match=r"n=2.*generate"):
            _ = [chunk async for chunk in chat.astream("Say.", n=2)]


def test_a_retry_policy_tries_again_where_it_helps() -> None:
    """LangGraph's own policy repeats a node for want of memory, and for no other error of ours."""
    policy: Any = RetryPolicy().retry_on
    assert policy(dd.OutOfBlocks(1, 0, 0))
    for error in (BranchError, RequestError, ConstraintError, ContextOverflow, EngineClosed, SnapshotError):
        assert not policy(error("no"))
