"""Checkpoints over all three savers hold K/V as a lease and tokens in a table; what that gives, and what frees it."""

import asyncio
import gc
import operator
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.cache.memory import InMemoryCache
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import CachePolicy, Send

from dendrite.engine.engine import Engine
from dendrite.engine.errors import BranchError, RequestError
from dendrite.integrations.engines import ENGINES, EngineSettings
from dendrite.integrations.langgraph import TimeTravelSaver, fork_node, generate_node, open_handle
from dendrite.integrations.langgraph.handles import Snapshot, is_reference, packed_tokens
from dendrite.testing import scripted_engine

PROMPT = "Count. " * 100
"""About 700 tokens of the scripted engine."""


def script(text: str) -> list[str]:
    return [" 1", " 2", " 3"]


def concatenated(state: list[str], writes: list[list[str]]) -> list[str]:
    return [*state, *(text for write in writes for text in write)]


class Ideas(TypedDict, total=False):
    branches: list[str]
    texts: list[str]
    log: Annotated[list[str], DeltaChannel(concatenated, snapshot_frequency=4)]
    """Handles too, in a channel that is stored as deltas."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    with scripted_engine(script) as engine:
        yield engine
        engine.check_integrity()


@pytest.fixture(params=["memory", "sqlite", "async sqlite"])
async def saver(request: pytest.FixtureRequest, tmp_path: Path, engine: Engine) -> AsyncIterator[TimeTravelSaver]:
    if request.param == "memory":
        yield TimeTravelSaver(InMemorySaver(), engine)
    elif request.param == "sqlite":
        with SqliteSaver.from_conn_string(str(tmp_path / "saved.sqlite")) as inner:
            yield TimeTravelSaver(inner, engine)
    else:
        async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "saved.sqlite")) as saved:
            yield TimeTravelSaver(saved, engine)


def ideas_graph(engine: Engine | str, saver: TimeTravelSaver | None, **options: Any) -> Any:
    builder = StateGraph(Ideas)
    fork = fork_node(2, engine=engine, prompt=lambda state: PROMPT)
    builder.add_node("fork", fork, cache_policy=options.pop("cache_policy", None))
    builder.add_node("generate", generate_node(engine=engine, max_tokens=3, temperature=1.0))
    builder.add_node("note", lambda state: {"log": state["branches"]})
    builder.add_edge(START, "fork")
    builder.add_edge("fork", "generate")
    builder.add_edge("generate", "note")
    return builder.compile(checkpointer=saver, **options)


def thread(name: str) -> Any:
    return {"configurable": {"thread_id": name}}


async def before_generate(graph: Any, name: str) -> Any:
    history = [saved async for saved in graph.aget_state_history(thread(name))]
    return next(saved for saved in history if saved.next == ("generate",))


def num_paths(*states: Any) -> int:
    """The prompt, and each text that was generated behind it."""
    return 1 + len({text for state in states for text in state["texts"]})


async def stored(saver: TimeTravelSaver) -> CheckpointTuple:
    """The latest checkpoint of thread 1 as the wrapped saver has it."""
    kept = await asyncio.to_thread(saver._inner.get_tuple, thread("1"))
    assert kept is not None
    return kept


def computed(engine: Engine) -> int:
    return engine.stats().tokens_computed


# --- what a checkpoint holds -------------------------------------------------------------------------------------


async def test_a_checkpoint_keeps_its_kv(engine: Engine, saver: TimeTravelSaver) -> None:
    """Replay and `update_state` from an old one compute new tokens only, though the cache was lost meanwhile."""
    graph = ideas_graph(engine, saver)
    first = await graph.ainvoke({}, thread("1"))
    assert computed(engine) > 700
    assert saver.num_leases == engine.stats().branches == num_paths(first)
    assert engine.stats().blocks_used > 700 // 4
    engine.clear_cache()
    old = await before_generate(graph, "1")
    before = computed(engine)
    again = await graph.ainvoke(None, old.config)
    assert len(again["texts"]) == 2
    assert computed(engine) - before <= 2 * 3 + 2
    engine.clear_cache()
    changed = await graph.aupdate_state(old.config, {"branches": first["branches"][:1]})
    before = computed(engine)
    await graph.ainvoke(None, changed)
    assert computed(engine) - before <= 3 + 2


async def test_without_an_engine_a_checkpoint_holds_tokens_alone(engine: Engine) -> None:
    """The same then costs the prompt again."""
    graph = ideas_graph(engine, TimeTravelSaver(InMemorySaver()))
    await graph.ainvoke({}, thread("1"))
    assert engine.stats().branches == 0
    engine.clear_cache()
    old = await before_generate(graph, "1")
    before = computed(engine)
    await graph.ainvoke(None, old.config)
    assert computed(engine) - before > 700


async def test_what_is_stored_is_short(engine: Engine, saver: TimeTravelSaver) -> None:
    """Who reads the state gets whole handles; checkpoints have short ones, whose tokens are in the table once."""
    graph = ideas_graph(engine, saver)
    state = await graph.ainvoke({}, thread("1"))
    saved = await graph.aget_state(thread("1"))
    assert saved.values["branches"] == saved.values["log"] == state["branches"]
    kept = await stored(saver)
    assert all(len(handle) < 80 for handle in kept.checkpoint["channel_values"]["branches"])
    with open_handle(engine, saved.values["branches"][0]) as branch:
        assert branch.text.endswith(state["texts"][0])
    with pytest.raises(BranchError, match="stale"):
        open_handle(engine, kept.checkpoint["channel_values"]["branches"][0])


# --- when it is freed --------------------------------------------------------------------------------------------


async def test_a_copied_thread_holds_what_the_first_does(engine: Engine, saver: TimeTravelSaver) -> None:
    """Deleting one leaves the other's K/V; deleting both frees all of it, and the tokens."""
    graph = ideas_graph(engine, saver)
    await graph.ainvoke({}, thread("1"))
    held = engine.stats().blocks_used
    await saver.acopy_thread("1", "2")
    assert engine.stats().blocks_used == held
    await saver.adelete_thread("1")
    assert engine.stats().blocks_used == held
    engine.clear_cache()
    old = await before_generate(graph, "2")
    before = computed(engine)
    await graph.ainvoke(None, old.config)
    assert computed(engine) - before <= 2 * 3 + 2
    await saver.adelete_thread("2")
    assert saver.num_leases == engine.stats().branches == engine.stats().blocks_used == 0
    tokens = ("SELECT * FROM dendrite_tokens", [()])
    assert not await asyncio.to_thread(saver._handles._table._database.run, [tokens])


async def test_pruning_frees_what_only_old_checkpoints_name(engine: Engine, saver: TimeTravelSaver) -> None:
    """The latest keeps its own, and what a delta channel is put together from; the thread goes on."""
    graph = ideas_graph(engine, saver)
    for _ in range(2):
        await graph.ainvoke({}, thread("1"))
    values = (await graph.aget_state(thread("1"))).values
    assert len(values["log"]) == 4
    num_before = saver.num_leases
    await saver.aprune(["1"])
    assert saver.num_leases == engine.stats().branches
    assert saver.num_leases <= num_before
    assert (await graph.aget_state(thread("1"))).values == values
    for _ in range(4):  # past a snapshot of the channel: nothing of before is needed any more
        await graph.ainvoke({"log": []}, thread("1"))
    await saver.aprune(["1"])
    assert len((await graph.aget_state(thread("1"))).values["log"]) == 12
    await saver.aprune(["1"], strategy="delete")
    assert engine.stats().branches == 0


async def test_only_old_checkpoints_hold_the_prompt_alone(engine: Engine, saver: TimeTravelSaver) -> None:
    """A branch that no checkpoint names any more is let go."""
    builder = StateGraph(Ideas)
    builder.add_node("fork", fork_node(2, engine=engine, prompt=lambda state: PROMPT))
    builder.add_node("generate", generate_node(engine=engine, max_tokens=3, temperature=1.0))
    builder.add_edge(START, "fork")
    builder.add_edge("fork", "generate")
    graph = builder.compile(checkpointer=saver)
    state = await graph.ainvoke({}, thread("1"))
    assert saver.num_leases == num_paths(state)
    await saver.aprune(["1"])
    assert saver.num_leases == num_paths(state) - 1


async def test_a_lease_gives_way_to_what_runs(saver: TimeTravelSaver) -> None:
    """Checkpoints fill a small pool, and a call that needs nearly all of it runs; going back still works."""
    with scripted_engine(script, num_blocks=300, swap_memory=0) as small:
        held = TimeTravelSaver(saver._inner, small)
        graph = ideas_graph(small, held)
        texts = (await graph.ainvoke({}, thread("1")))["texts"]
        assert small.stats().blocks_used > 700 // 4
        with small.root("x" * 1100) as root:
            assert root.generate(max_tokens=2).finish_reason
        old = await before_generate(graph, "1")
        assert len((await graph.ainvoke(None, old.config))["texts"]) == len(texts)
        small.check_integrity()


async def test_a_lease_goes_before_what_a_program_holds() -> None:
    """A full pool keeps an idle branch of the user's, though it was used before the checkpoint's."""
    with scripted_engine(script, num_blocks=400, swap_memory=0) as small, small.root("y" * 400) as mine:
        mine.generate(max_tokens=1)
        graph = ideas_graph(small, TimeTravelSaver(InMemorySaver(), small))
        await graph.ainvoke({}, thread("1"))
        with small.root("x" * 1100) as root:
            root.generate(max_tokens=1)
        before = computed(small)
        mine.generate(max_tokens=1)
        assert computed(small) - before <= 2


async def test_the_number_of_leases_is_bounded(engine: Engine) -> None:
    """The branches used longest ago go first; none at all is a choice too."""
    saver = TimeTravelSaver(InMemorySaver(), engine, most_leases=1)
    await ideas_graph(engine, saver).ainvoke({}, thread("1"))
    assert saver.num_leases == engine.stats().branches == 1
    none = TimeTravelSaver(InMemorySaver(), engine, most_leases=0)
    await ideas_graph(engine, none).ainvoke({}, thread("1"))
    assert none.num_leases == 0
    with pytest.raises(RequestError, match="most_leases"):
        TimeTravelSaver(InMemorySaver(), engine, most_leases=-1)


async def test_a_saver_that_goes_frees_all(engine: Engine) -> None:
    """Its leases go with it."""
    saver = TimeTravelSaver(InMemorySaver(), engine)
    graph = ideas_graph(engine, saver)
    await graph.ainvoke({}, thread("1"))
    assert engine.stats().branches
    await asyncio.get_running_loop().shutdown_default_executor()  # its threads may have the last call a moment longer
    del saver, graph
    gc.collect()
    assert engine.stats().branches == 0


# --- when it is rebuilt ------------------------------------------------------------------------------------------


async def test_handles_are_rebuilt_after_a_restart(engine: Engine, tmp_path: Path) -> None:
    """Another process has the file alone: the tokens come from its table, and are computed again."""
    path = str(tmp_path / "saved.sqlite")
    with SqliteSaver.from_conn_string(path) as inner:
        first = ideas_graph(engine, TimeTravelSaver(inner, engine)).invoke({}, thread("1"))
    with scripted_engine(script) as restarted, SqliteSaver.from_conn_string(path) as inner:
        saver = TimeTravelSaver(inner, restarted)
        graph = ideas_graph(restarted, saver)
        assert graph.get_state(thread("1")).values["texts"] == first["texts"]
        old = await before_generate(graph, "1")
        again = await graph.ainvoke(None, old.config)
        assert computed(restarted) > 700
        assert saver.num_leases
        with open_handle(restarted, again["branches"][0]) as branch:
            assert branch.text.endswith(again["texts"][0])


async def test_kv_outlives_the_process_where_it_is_kept(tmp_path: Path) -> None:
    """With a folder of prefixes a restart computes no token of a checkpoint's branches but the last of each."""
    path = str(tmp_path / "saved.sqlite")
    with scripted_engine(script, prefix_cache=tmp_path / "kv") as engine, SqliteSaver.from_conn_string(path) as inner:
        saver = TimeTravelSaver(inner, engine)
        ideas_graph(engine, saver).invoke({}, thread("1"))
        assert await saver.akeep_kv(thread("1")) <= 2
        assert saver.keep_kv(thread("unknown")) == 0
    with scripted_engine(script, prefix_cache=tmp_path / "kv") as restarted:
        with SqliteSaver.from_conn_string(path) as inner:
            graph = ideas_graph(restarted, TimeTravelSaver(inner, restarted))
            for handle in graph.get_state(thread("1")).values["branches"]:
                with open_handle(restarted, handle) as branch:
                    branch.generate(max_tokens=1)
        assert computed(restarted) <= 4
        restarted.check_integrity()


def test_kv_cannot_be_kept_without_a_place(engine: Engine) -> None:
    """The error says what is missing: an engine, or its folder."""
    saver = TimeTravelSaver(InMemorySaver(), engine)
    ideas_graph(engine, saver).invoke({}, thread("1"))
    with pytest.raises(RequestError, match="prefix_cache="):
        saver.keep_kv(thread("1"))
    with pytest.raises(RequestError, match="no engine"):
        TimeTravelSaver(InMemorySaver()).keep_kv(thread("1"))


def test_a_name_outlives_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the engine of a name was closed, nodes and savers go on with a new one."""
    monkeypatch.setattr(Engine, "load", lambda name, **settings: scripted_engine(script))
    with ENGINES.lease(EngineSettings("outlived-model")) as lease:
        saver = TimeTravelSaver(InMemorySaver(), "outlived-model")
        graph = ideas_graph("outlived-model", saver)
        first = graph.invoke({}, thread("1"))
        assert saver.num_leases == lease.engine.stats().branches == num_paths(first)
        lease.engine.close()
        again = graph.invoke({}, thread("2"))
        with ENGINES.lease(EngineSettings("outlived-model")) as new:
            assert new.engine is not lease.engine
            assert saver.num_leases == new.engine.stats().branches == num_paths(again)


async def test_altered_tokens_are_not_gone_on_from(engine: Engine, saver: TimeTravelSaver) -> None:
    """A path that is not the one its reference names makes the handle stale; it is never taken for the branch."""
    graph = ideas_graph(engine, saver)
    await graph.ainvoke({}, thread("1"))
    other = packed_tokens(Snapshot("scripted", (1, 2, 3), 0).handle())
    for data in (other, b"noise", other[:-2]):
        await asyncio.to_thread(
            saver._handles._table._database.run, [("UPDATE dendrite_tokens SET tokens=?", [(data,)])]
        )
        read = (await graph.aget_state(thread("1"))).values["branches"]
        assert is_reference(read[0])
        with pytest.raises(BranchError, match="altered"):
            open_handle(engine, read[0])


async def test_a_cached_nodes_old_handle_is_rebuilt(engine: Engine, saver: TimeTravelSaver) -> None:
    """The node does not run, its thread is gone and so is its K/V: the handle serves all the same."""
    graph = ideas_graph(engine, saver, cache=InMemoryCache(), cache_policy=CachePolicy(key_func=lambda state: "fork"))
    await graph.ainvoke({}, thread("1"))
    await saver.adelete_thread("1")
    engine.clear_cache()
    assert engine.stats().branches == 0
    before = computed(engine)
    updates = [update async for update in graph.astream({}, thread("2"), stream_mode="updates")]
    assert updates[0]["__metadata__"]["cached"]
    assert computed(engine) - before > 700
    assert saver.num_leases == num_paths(updates[1]["generate"])


# --- odd states --------------------------------------------------------------------------------------------------


class Fanned(TypedDict, total=False):
    branches: list[str]
    texts: Annotated[list[str], operator.add]
    nested: dict[str, Any]


async def test_handles_are_found_where_graphs_put_them(engine: Engine, saver: TimeTravelSaver) -> None:
    """In a `Send`, in nested values, in tuples; and what only looks like one stays what it is."""
    builder = StateGraph(Fanned)
    builder.add_node("fork", fork_node(2, engine=engine, prompt=lambda state: "Count."))
    builder.add_node("generate", generate_node(engine=engine, max_tokens=3, temperature=1.0))
    builder.add_node("nest", lambda state: {"nested": {"deep": [(state["branches"][0], 1)], "like": "dendrite:1:x"}})
    builder.add_edge(START, "fork")
    builder.add_conditional_edges("fork", lambda state: [Send("nest", {"branches": state["branches"][:1]})], ["nest"])
    graph = builder.compile(checkpointer=saver)
    await graph.ainvoke({}, thread("1"), interrupt_before=["nest"])
    kept = await stored(saver)
    (send,) = kept.checkpoint["channel_values"]["__pregel_tasks"]
    assert send.arg["branches"][0].startswith("dendrite:ref:")
    state = await graph.ainvoke(None, thread("1"))
    assert state["nested"]["like"] == "dendrite:1:x"
    saved = (await graph.aget_state(thread("1"))).values["nested"]
    with open_handle(engine, saved["deep"][0][0]) as branch:
        assert branch.num_tokens


def test_an_engine_goes_by_name(engine: Engine) -> None:
    """As in the nodes."""
    ENGINES.register("leased", engine)
    saver = TimeTravelSaver(InMemorySaver(), "leased")
    state = ideas_graph(engine, saver).invoke({}, thread("1"))
    assert saver.num_leases == num_paths(state)
    ENGINES.unregister("leased")


def test_a_checkpoint_is_written_without_its_engine() -> None:
    """An engine that was closed, or runs another model, holds nothing; the checkpoint is whole."""
    with scripted_engine(script) as engine, scripted_engine(script) as closed:
        closed.close()
        saver = TimeTravelSaver(InMemorySaver(), closed)
        graph = ideas_graph(engine, saver)
        state = graph.invoke({}, thread("1"))
        assert saver.num_leases == 0
        assert graph.get_state(thread("1")).values["branches"] == state["branches"]


async def test_an_async_saver_says_how_it_is_called(engine: Engine, tmp_path: Path) -> None:
    """A sync call on its own event loop is refused, where it would wait for ever."""
    async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "saved.sqlite")) as inner:
        saver = TimeTravelSaver(inner, engine)
        with pytest.raises(RequestError, match="ainvoke"):
            saver._handles.release_thread("1")


def test_a_failed_statement_changes_nothing(tmp_path: Path) -> None:
    """Our tables are written in one transaction."""
    with SqliteSaver.from_conn_string(str(tmp_path / "saved.sqlite")) as inner:
        database = TimeTravelSaver(inner)._handles._table._database
        database.run([("CREATE TABLE mine (x)", [()])])
        with pytest.raises(sqlite3.OperationalError):
            database.run([("INSERT INTO mine VALUES (1)", [()]), ("nonsense", [()])])
        assert not database.run([("SELECT * FROM mine", [()])])
