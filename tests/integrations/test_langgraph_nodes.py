"""Nodes of graphs on a scripted engine: what reaches the state and the streams, and what stays behind."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, RetryPolicy

import dendrite as dd
from dendrite.engine.engine import Engine
from dendrite.engine.errors import BranchError, ProgramError, RequestError
from dendrite.integrations.engines import ENGINES
from dendrite.integrations.langchain import ChatDendrite
from dendrite.integrations.langgraph import (
    Found,
    fork_node,
    generate_node,
    handle_of,
    open_handle,
    pick_node,
    prune_node,
    score_node,
    search_graph,
    search_node,
)
from dendrite.integrations.langgraph.handles import Snapshot
from dendrite.testing import scripted_engine


def script(text: str) -> Any:
    if text.endswith("good?"):
        return {" yes": text.count("3") + 0.1, " no": 1.0}
    return [" 1", " 2", " 3"]


@dd.score
def large(node: dd.Node) -> float:
    return float(node.text)


program = dd.compile(dd.expand(cue="\nAdd:", width=4, stop="\n"), large, dd.prune(keep=2), strategy=dd.Beam(depth=3))


class Chat(TypedDict, total=False):
    messages: Annotated[list[AnyMessage], add_messages]
    branch: str
    leaves: list[dict[str, object]]


class Driven(TypedDict, total=False):
    branch: str
    branches: list[str]
    texts: list[str]
    scores: list[float]


@dataclass
class Context:
    engine: Engine | None = None


@pytest.fixture
def engine() -> Iterator[Engine]:
    with scripted_engine(script) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats().branches == 0


def question(state: Chat) -> str:
    return state["messages"][-1].text


def answer(found: Found[object]) -> dict[str, object]:
    return {"messages": [AIMessage(found.best.transcript)], "branch": found.handle, "leaves": found.branches}


def chat_graph(engine: Any, *, checkpointer: Any = None, **options: Any) -> Any:
    builder = StateGraph(Chat, context_schema=Context)
    node = search_node(program, engine=engine, prompt=question, **{"update": answer, **options})
    builder.add_node("search", node, retry_policy=RetryPolicy(max_attempts=2, initial_interval=0.0, jitter=False))
    builder.add_edge(START, "search")
    return builder.compile(checkpointer=checkpointer)


ASK: Any = {"messages": [HumanMessage("Count.")]}


# --- search_node -------------------------------------------------------------------------------------------------


def test_a_search_is_one_node(engine: Engine) -> None:
    """It maps the user's own keys, and the state gets strings: messages, a handle, the leaves."""
    state = chat_graph(engine).invoke(ASK)
    assert state["messages"][-1].text.count("Add:") == 3
    assert state["branch"] == state["leaves"][0]["handle"]
    assert len(state["leaves"]) == 2
    with open_handle(engine, state["branch"]) as branch:
        assert branch.text.endswith(state["leaves"][0]["text"])


async def test_it_works_in_async_graphs_too(engine: Engine) -> None:
    """The same node, the same search with the same seed."""
    graph = chat_graph(engine, seed=3)
    assert (await graph.ainvoke(ASK))["branch"] == graph.invoke(ASK)["branch"]


async def test_progress_goes_to_custom_and_only_the_answer_to_messages(engine: Engine) -> None:
    """Custom events are plain values in order; the messages stream has the winner's text once."""
    graph = chat_graph(engine)
    custom = list(graph.stream(ASK, stream_mode="custom"))
    assert custom[0]["kind"] == "opened"
    assert custom[-1]["kind"] == "done"
    assert {"expanded", "scored", "round", "pruned"} <= {event["kind"] for event in custom}
    parts = [part async for part in graph.astream(ASK, stream_mode=["messages", "custom"])]
    messages = [part[0].text for mode, part in parts if mode == "messages"]
    assert len(messages) == 1
    assert messages[0].count("Add:") == 3


def test_an_engine_comes_by_name_or_from_the_context(engine: Engine) -> None:
    """A registered name and a function of the Runtime serve; a forgotten context says what to do."""
    ENGINES.register("node-engine", engine)
    assert chat_graph("node-engine").invoke(ASK)["branch"]
    ENGINES.unregister("node-engine")
    graph = chat_graph(lambda runtime: runtime.context.engine)
    assert graph.invoke(ASK, context=Context(engine))["branch"]
    with pytest.raises(RequestError, match="context="):
        graph.invoke(ASK)
    with pytest.raises(RequestError, match="context="):
        graph.invoke(ASK, context=Context())
    with pytest.raises(RequestError, match="is none"):
        chat_graph(7)


def test_a_retry_searches_the_same_way(engine: Engine) -> None:
    """What fails after the search is retried with the same seed, so that it finds the same."""
    found: list[str] = []

    def flaky(result: Found[object]) -> dict[str, object]:
        found.append(result.handle)
        if len(found) == 1:
            raise dd.OutOfBlocks(1, 0, 0)
        return answer(result)

    chat_graph(engine, update=flaky).invoke(ASK)
    assert len(found) == 2
    assert found[0] == found[1]


async def test_an_update_may_say_where_the_graph_goes_on(engine: Engine) -> None:
    """A `Command` is passed on, as from any node."""

    def routed(found: Found[object]) -> Command[str]:
        return Command(update={"branch": found.handle}, goto="high" if found.best.value else "low")

    node = search_node(program, engine=engine, prompt=question, update=routed)
    builder = StateGraph(Chat)
    builder.add_node("search", node, destinations=("high", "low"))
    builder.add_node("high", lambda state: {"messages": [AIMessage("high")]})
    builder.add_node("low", lambda state: {"messages": [AIMessage("low")]})
    builder.add_edge(START, "search")
    for state in (builder.compile().invoke(ASK), await builder.compile().ainvoke(ASK)):
        assert state["messages"][-1].text == "high"
        assert state["branch"].startswith("dendrite:1:")


def test_an_update_that_is_none_is_refused(engine: Engine) -> None:
    """With what it should be; nothing of the search is left."""
    with pytest.raises(ProgramError, match="return a dict"):
        chat_graph(engine, update=lambda found: "done").invoke(ASK)


async def test_a_cancelled_node_leaves_nothing() -> None:
    """The task ends, and with it every branch of the search."""
    with scripted_engine(lambda text: " 1" * 3000 + "\n") as slow:
        task = asyncio.create_task(chat_graph(slow).ainvoke(ASK))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert slow.stats().branches == 0
        slow.check_integrity()


def test_a_human_picks_among_parked_branches(engine: Engine) -> None:
    """The search is done once, before the interrupt; the picked branch is the one that goes on."""
    searches: list[str] = []

    def seen(found: Found[object]) -> dict[str, object]:
        searches.append(found.handle)
        return answer(found)

    builder = StateGraph(Chat)
    builder.add_node("search", search_node(program, engine=engine, prompt=question, update=seen))
    builder.add_node("pick", pick_node(branches="leaves"))
    builder.add_edge(START, "search")
    builder.add_edge("search", "pick")
    graph = builder.compile(checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    stopped = graph.invoke(ASK, config)
    (asked,) = stopped["__interrupt__"]
    assert asked.value["num_branches"] == 2
    assert "handle" not in asked.value["branches"][0]
    assert engine.stats().branches == 0
    (again,) = graph.invoke(Command(resume=5), config)["__interrupt__"]
    assert "0 to 1" in again.value["problem"]
    resumed = graph.invoke(Command(resume=1), config)
    assert resumed["branch"] == resumed["leaves"][1]["handle"]
    assert len(searches) == 1


def test_several_answers_work_under_the_messages_stream(engine: Engine) -> None:
    """A node that asks for n answers gets n, though LangGraph would have models stream in this mode."""
    counts: list[int] = []

    def ask(state: Chat) -> dict[str, object]:
        with ChatDendrite(engine=engine, temperature=1.0) as chat:
            answers = chat.generate([list(state["messages"])], n=3).generations[0]
        counts.append(len(answers))
        return {"messages": [AIMessage(answers[0].text)]}

    builder = StateGraph(Chat)
    builder.add_node("ask", ask)
    builder.add_edge(START, "ask")
    assert list(builder.compile().stream(ASK, stream_mode="messages"))
    assert counts == [3]


# --- nodes that drive the tree -----------------------------------------------------------------------------------


def driven_graph(engine: Engine, *, checkpointer: Any = None) -> Any:
    builder = StateGraph(Driven)
    builder.add_node("fork", fork_node(4, engine=engine, prompt=lambda state: "Count."))
    builder.add_node("generate", generate_node(engine=engine, max_tokens=4, temperature=1.0))
    choice = dd.Choice({"yes": 1.0, "no": 0.0}, " good?")
    builder.add_node("score", score_node(choice, engine=engine))
    builder.add_node("prune", prune_node(2, also=["texts"]))
    for before, after in zip(
        [START, "fork", "generate", "score", "prune"], ["fork", "generate", "score", "prune", END], strict=True
    ):
        builder.add_edge(before, after)
    return builder.compile(checkpointer=checkpointer)


def test_nodes_drive_the_tree(engine: Engine) -> None:
    """Fork, generate, score, prune: handles, texts and scores stay side by side, best first."""
    state = driven_graph(engine).invoke({})
    assert len(state["branches"]) == len(state["texts"]) == len(state["scores"]) == 2
    assert state["scores"] == sorted(state["scores"], reverse=True)
    for handle, text in zip(state["branches"], state["texts"], strict=True):
        with open_handle(engine, handle) as branch:
            assert branch.text.endswith(text)


async def test_they_do_in_async_graphs_too(engine: Engine) -> None:
    """And tell the custom stream what is generated, by the token; nothing of several candidates is a message."""
    graph = driven_graph(engine)
    parts = [part async for part in graph.astream({}, stream_mode=["custom", "messages"])]
    assert {mode for mode, _ in parts} == {"custom"}
    told = [event for _, event in parts]
    ended = [event for event in told if event["type"] == "dendrite.generated"]
    assert [event["index"] for event in ended] == [0, 1, 2, 3]
    for index, event in enumerate(ended):
        pieces = [piece["text"] for piece in told if piece["type"] == "dendrite.token" and piece["index"] == index]
        assert "".join(pieces) == event["text"]
        assert len(pieces) > 1
    assert len((await graph.ainvoke({}))["branches"]) == 2


class Talk(TypedDict, total=False):
    messages: Annotated[list[AnyMessage], add_messages]
    branches: list[str]
    texts: list[str]


@pytest.mark.parametrize("is_async", [False, True])
async def test_an_only_branch_speaks_as_a_chat_model_does(engine: Engine, is_async: bool) -> None:
    """Token by token in both streams, the message in the state is the streamed one, and callbacks see a model."""
    builder = StateGraph(Talk)
    builder.add_node("fork", fork_node(1, engine=engine, prompt=lambda state: "Count."))
    builder.add_node("say", generate_node(engine=engine, max_tokens=4, messages="messages"))
    builder.add_edge(START, "fork")
    builder.add_edge("fork", "say")
    graph: Any = builder.compile()
    modes = ["messages", "custom", "values"]
    if is_async:
        parts = [part async for part in graph.astream({}, stream_mode=modes)]
    else:
        parts = list(graph.stream({}, stream_mode=modes))
    chunks = [part[0] for mode, part in parts if mode == "messages"]
    custom = [part["text"] for mode, part in parts if mode == "custom" and part["type"] == "dendrite.token"]
    state = parts[-1][1]
    assert len(custom) > 1
    assert [chunk.text for chunk in chunks if chunk.text] == custom
    assert "".join(custom) == state["texts"][0] == state["messages"][0].text
    assert {chunk.id for chunk in chunks} == {state["messages"][0].id}
    assert state["messages"][0].usage_metadata["output_tokens"] >= len(custom)
    assert state["messages"][0].response_metadata["finish_reason"] == "eos"
    with open_handle(engine, state["branches"][0]) as branch:
        assert branch.text.endswith(state["texts"][0])


def test_a_seed_gives_the_same_texts_but_not_one_text(engine: Engine) -> None:
    """The same handles get the same, run after run; each branch draws for itself."""
    builder = StateGraph(Driven)
    builder.add_node("generate", generate_node(engine=engine, max_tokens=4, temperature=1.0, seed=1))
    builder.add_edge(START, "generate")
    graph = builder.compile()
    with engine.root("Count.", seed=1) as root:
        handles = [handle_of(fork) for fork in root.fork(8)]
    texts = graph.invoke({"branches": handles})["texts"]
    assert texts == graph.invoke({"branches": handles})["texts"]
    assert len(set(texts)) > 1


async def test_a_generation_that_is_left_leaves_nothing() -> None:
    """Of one branch, and of several: the first token is seen, then the stream is closed."""
    with scripted_engine(lambda text: " 1" * 3000 + "\n") as slow:
        for num in (1, 3):
            builder = StateGraph(Driven)
            builder.add_node("fork", fork_node(num, engine=slow, prompt=lambda state: "Count."))
            builder.add_node("generate", generate_node(engine=slow, max_tokens=6000))
            builder.add_edge(START, "fork")
            builder.add_edge("fork", "generate")
            events: Any = builder.compile().astream({}, stream_mode="custom")
            assert (await anext(events))["type"] == "dendrite.token"
            await events.aclose()
            assert slow.stats().branches == 0
        slow.check_integrity()


def test_forks_draw_differently_and_one_prefill_serves_them(engine: Engine) -> None:
    """The prompt is computed once for all forks."""
    before = engine.stats().tokens_computed
    texts: set[str] = set()
    for _ in range(4):
        for update in driven_graph(engine).stream({}, stream_mode="updates"):
            texts |= set(update.get("generate", {}).get("texts", ()))  # of all forks, before the best are chosen
    assert len(texts) > 1
    prompt = len(engine.tokenizer.render([{"role": "user", "content": "Count."}]))
    assert engine.stats().tokens_computed - before < prompt + 4 * 4 * (4 + len(" good?") + len(" yes") + 4)


def test_missing_keys_are_named(engine: Engine) -> None:
    """A node without what it reads says which key it wants."""
    builder = StateGraph(Driven)
    builder.add_node("generate", generate_node(engine=engine))
    builder.add_edge(START, "generate")
    with pytest.raises(RequestError, match="'branches'"):
        builder.compile().invoke({"texts": []})
    with pytest.raises(RequestError, match="1 or more"):
        fork_node(0, engine=engine)


# --- handles and time travel -------------------------------------------------------------------------------------


def test_handles_refuse_what_is_not_theirs(engine: Engine) -> None:
    """Other strings, changed ones, and those of another model."""
    with engine.root("Some text") as root:
        handle = handle_of(root)
        with open_handle(engine, handle) as branch:
            assert branch.token_ids == root.token_ids
    with pytest.raises(BranchError, match="no handle"):
        open_handle(engine, "branch 7")
    with pytest.raises(BranchError, match="was changed"):
        open_handle(engine, handle[:-1] + "x")
    foreign = Snapshot("another-model", (1, 2), 0).handle()
    with pytest.raises(BranchError, match=r"'another-model'.*'scripted'"):
        open_handle(engine, foreign)
    with pytest.raises(BranchError, match="pruned"):
        handle_of(root)


def test_going_back_to_a_checkpoint_computes_only_what_is_new(engine: Engine) -> None:
    """A replay from before `generate` draws anew on the same K/V: the long prompt is not computed again."""
    builder = StateGraph(Driven)
    builder.add_node("fork", fork_node(2, engine=engine, prompt=lambda state: "Count. " * 200))
    builder.add_node("generate", generate_node(engine=engine, max_tokens=3, temperature=1.0))
    builder.add_edge(START, "fork")
    builder.add_edge("fork", "generate")
    graph = builder.compile(checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    first = graph.invoke({}, config)
    before = engine.stats().tokens_computed
    assert before > 1400
    old = next(saved for saved in graph.get_state_history(config) if saved.next == ("generate",))
    again = graph.invoke(None, old.config)
    assert engine.stats().tokens_computed - before <= 2 * 3 + 2
    assert len(again["texts"]) == len(first["texts"]) == 2
    changed = graph.update_state(old.config, {"branches": first["branches"][:1]})
    before = engine.stats().tokens_computed
    graph.invoke(None, changed)
    assert engine.stats().tokens_computed - before <= 3 + 2


def test_a_handle_is_rebuilt_in_a_new_engine(engine: Engine) -> None:
    """After a restart the tokens are computed again, and the text is the same."""
    state = driven_graph(engine).invoke({})
    with scripted_engine(script) as restarted, open_handle(restarted, state["branches"][0]) as branch:
        assert branch.text.endswith(state["texts"][0])
        assert branch.num_cached == 0
        assert branch.generate(max_tokens=2).finish_reason == "eos"


# --- search_graph ------------------------------------------------------------------------------------------------


def test_a_search_is_a_graph_with_a_superstep_a_round(engine: Engine) -> None:
    """Every round is in the history, with its frontier; the end is that of the search as a whole."""
    graph = search_graph(program, engine=engine, seed=3, checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    state = graph.invoke({"prompt": "Count."}, config)
    with program.run(engine, "Count.", seed=3) as whole:
        assert state["best"]["transcript"] == whole.best.transcript
        assert state["best"]["value"] == whole.best.value
    history = [saved.values.get("rounds") for saved in graph.get_state_history(config)]
    assert history[:4] == [4, 3, 2, 1]
    with open_handle(engine, state["best"]["handle"]) as branch:
        assert branch.text.endswith(state["best"]["text"])


async def test_it_stops_after_a_round_and_goes_on_in_another_engine(engine: Engine) -> None:
    """A round is durable: another engine with the same model ends the search as this one would have."""
    saver = InMemorySaver()
    graph = search_graph(program, engine=engine, seed=3, checkpointer=saver)
    config: Any = {"configurable": {"thread_id": "1"}}
    stopped = await graph.ainvoke({"prompt": "Count."}, config, interrupt_after=["round"])
    assert "best" not in stopped
    assert stopped["frontier"][0]["value"] is not None
    assert engine.stats().branches == 0
    with scripted_engine(script) as restarted:
        ended = search_graph(program, engine=restarted, seed=3, checkpointer=saver).invoke(None, config)
    with program.run(engine, "Count.", seed=3) as whole:
        assert ended["best"]["transcript"] == whole.best.transcript


async def test_a_cancelled_round_leaves_nothing() -> None:
    """It ends with the graph's task, not at the end of the round."""
    with scripted_engine(lambda text: " 1" * 3000 + "\n") as slow:
        task = asyncio.create_task(search_graph(program, engine=slow).ainvoke({"prompt": "Count."}))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert slow.stats().branches == 0
        slow.check_integrity()
