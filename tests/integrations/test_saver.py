"""`TimeTravelSaver` passes LangGraph's conformance suite, base and extended, over all three savers that it wraps."""

import sqlite3
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import validate
from langgraph.checkpoint.conformance.capabilities import ALL_CAPABILITIES
from langgraph.checkpoint.conformance.initializer import RegisteredCheckpointer
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph

from dendrite.engine.errors import RequestError
from dendrite.integrations.langgraph import TimeTravelSaver


@pytest.fixture(params=["memory", "sqlite"])
def saver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TimeTravelSaver]:
    if request.param == "memory":
        yield TimeTravelSaver(InMemorySaver())
        return
    connection = sqlite3.connect(tmp_path / "checkpoints.sqlite", check_same_thread=False)
    yield TimeTravelSaver(SqliteSaver(connection))
    connection.close()


async def test_it_conforms(saver: TimeTravelSaver) -> None:
    """All tests of all capabilities, the optional ones too."""
    await check_conformance(saver)


async def test_it_conforms_over_an_async_saver(tmp_path: Path) -> None:
    """The same over an `AsyncSqliteSaver`."""
    async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "checkpoints.sqlite")) as inner:
        await check_conformance(TimeTravelSaver(inner))


async def check_conformance(saver: TimeTravelSaver) -> None:
    async def factory() -> AsyncGenerator[BaseCheckpointSaver[str], None]:
        yield saver

    report = await validate(RegisteredCheckpointer("dendrite", factory))
    assert set(report.results) == {capability.value for capability in ALL_CAPABILITIES}
    failures = [failure for result in report.results.values() for failure in result.failures or ()]
    assert not failures, "\n".join(failures)
    assert all(result.passed for result in report.results.values())
    assert sum(result.tests_passed for result in report.results.values()) >= 81


def concatenated(state: list[str], writes: list[list[str]]) -> list[str]:
    return [*state, *(text for write in writes for text in write)]


class Log(TypedDict, total=False):
    lines: Annotated[list[str], DeltaChannel(concatenated, snapshot_frequency=4)]
    count: int


def counting_graph(saver: TimeTravelSaver) -> Any:
    builder = StateGraph(Log)
    builder.add_node("count", lambda state: {"lines": [str(state.get("count", 0))], "count": state.get("count", 0) + 1})
    builder.add_edge(START, "count")
    return builder.compile(checkpointer=saver)


def thread(name: str) -> Any:
    return {"configurable": {"thread_id": name}}


def test_a_copied_thread_is_a_fork(saver: TimeTravelSaver) -> None:
    """Both threads go on, each its own way, from a channel that is stored as deltas."""
    graph = counting_graph(saver)
    for _ in range(3):
        graph.invoke({}, thread("one"))
    saver.copy_thread("one", "two")
    assert graph.get_state(thread("two")).values == graph.get_state(thread("one")).values
    graph.invoke({}, thread("two"))
    assert graph.get_state(thread("two")).values["lines"] == ["0", "1", "2", "3"]
    assert graph.get_state(thread("one")).values["lines"] == ["0", "1", "2"]
    with pytest.raises(RequestError, match="'two' has checkpoints"):
        saver.copy_thread("one", "two")


def test_a_pruned_thread_goes_on(saver: TimeTravelSaver) -> None:
    """What a delta channel needs stays, the rest goes."""
    graph = counting_graph(saver)
    for _ in range(6):
        graph.invoke({}, thread("one"))
    before = len(list(saver.list(thread("one"))))
    values = graph.get_state(thread("one")).values
    saver.prune(["one"])
    assert len(list(saver.list(thread("one")))) < before
    assert graph.get_state(thread("one")).values == values
    assert graph.invoke({}, thread("one"))["lines"] == [*values["lines"], "6"]
    with pytest.raises(RequestError, match="keep_latest, delete"):
        saver.prune(["one"], strategy="some")
    saver.prune(["one"], strategy="delete")
    assert not list(saver.list(thread("one")))


def test_other_savers_are_refused() -> None:
    """With what to give instead."""

    class Other(BaseCheckpointSaver[str]):
        pass

    with pytest.raises(RequestError, match="not a Other"):
        TimeTravelSaver(Other())
