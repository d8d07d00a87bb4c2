"""Agents of `create_agent` on a scripted engine: plain, and with middleware that chooses among candidates."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool

from dendrite.engine.engine import Engine
from dendrite.engine.errors import CallbackError, RequestError
from dendrite.integrations.langchain import ChatDendrite
from dendrite.integrations.langchain.middleware import BestOfN, TreeSearch
from dendrite.testing import scripted_engine


def call(number: int) -> str:
    return f'<tool_call>\n{{"name": "look", "arguments": {{"at": {number}}}}}\n</tool_call>'


def script(text: str) -> Any:
    if "<tool_response>" in text:
        return "It is " + text.rpartition("<tool_response>\n")[2].partition("\n")[0]
    if "Guess." in text:
        return ["one", "two", "three"]
    return [call(1), call(2), call(3)] if "Look." in text else "Hello"


@pytest.fixture
def engine() -> Iterator[Engine]:
    with scripted_engine(script) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats().branches == 0


@pytest.fixture
def chat(engine: Engine) -> ChatDendrite:
    return ChatDendrite(engine=engine, temperature=1.0)


class Looks:
    """A tool that counts its runs."""

    def __init__(self) -> None:
        self.seen: list[int] = []

        @tool
        def look(at: int) -> str:
            """Look at a place."""
            self.seen.append(at)
            return f"value {at}"

        self.tool = look


def ask(text: str) -> Any:
    return {"messages": [HumanMessage(text)]}


def three(messages: Sequence[BaseMessage]) -> float:
    last = messages[-1]
    if isinstance(last, AIMessage) and last.tool_calls:
        return float(last.tool_calls[0]["args"]["at"] == 3)
    return float("three" in last.text)


def test_a_plain_agent_calls_its_tools(chat: ChatDendrite) -> None:
    """The model calls, the tool answers, the model says what it saw."""
    looks = Looks()
    state = create_agent(chat, [looks.tool]).invoke(ask("Look."))
    kinds = [type(message).__name__ for message in state["messages"]]
    assert kinds == ["HumanMessage", "AIMessage", "ToolMessage", "AIMessage"]
    assert state["messages"][-1].text == f"It is value {looks.seen[0]}"


def test_the_best_of_n_wins_and_its_tools_run_once(engine: Engine, chat: ChatDendrite) -> None:
    """Of many candidates the scored best is said; the others' tools never run, their prompt is computed once."""
    looks = Looks()
    agent = create_agent(chat, [looks.tool], middleware=[BestOfN(12, score=three)])
    state = agent.invoke(ask("Look."))
    assert looks.seen == [3]
    assert state["messages"][1].tool_calls[0]["args"] == {"at": 3}
    assert agent.invoke(ask("Guess."))["messages"][-1].text == "three"


async def test_async_agents_and_scorers_too(chat: ChatDendrite) -> None:
    """The same middleware under `ainvoke`, with a scorer that is awaited; only the winner is streamed."""

    async def later(messages: Sequence[BaseMessage]) -> float:
        return three(messages)

    agent = create_agent(chat, [], middleware=[BestOfN(12, score=later)])
    assert (await agent.ainvoke(ask("Guess.")))["messages"][-1].text == "three"
    parts: list[Any] = [part async for part in agent.astream(ask("Guess."), stream_mode="messages")]
    assert [part[0].text for part in parts] == ["three"]


def test_without_a_scorer_the_likeliest_wins() -> None:
    """What the model is surest of is what it says at temperature 0."""
    with scripted_engine(lambda text: {"rare": 0.2, "usual": 0.8}) as engine:
        chat = ChatDendrite(engine=engine, temperature=1.0)
        assert create_agent(chat, [], middleware=[BestOfN(12)]).invoke(ask("Say."))["messages"][-1].text == "usual"


def test_a_tree_search_looks_ahead_through_safe_tools(chat: ChatDendrite) -> None:
    """Safe tools run for the candidates, so that what they give decides; the winner's runs once more for the agent."""
    looks = Looks()

    def outcome(messages: Sequence[BaseMessage]) -> float:
        results = [message.text for message in messages if isinstance(message, ToolMessage)]
        return float(str(results[-1]).rpartition(" ")[2]) if results else 0.0

    search = TreeSearch(width=10, depth=2, keep=2, score=outcome, safe_tools=["look"])
    state = create_agent(chat, [looks.tool], middleware=[search]).invoke(ask("Look."))
    assert state["messages"][1].tool_calls[0]["args"] == {"at": 3}
    assert len(looks.seen) > 1
    assert looks.seen[-1] == 3


def test_a_safe_tool_that_raises_fails_its_candidate_alone(chat: ChatDendrite) -> None:
    """The candidate is told what happened, and the scorer sees it; the agent goes on with another."""

    @tool
    def look(at: int) -> str:
        """Look at a place."""
        if at != 2:
            raise ValueError(f"nothing at {at}")
        return "value 2"

    def sound(messages: Sequence[BaseMessage]) -> float:
        return float(any(isinstance(message, ToolMessage) and message.status == "success" for message in messages))

    search = TreeSearch(width=10, depth=2, keep=2, score=sound, safe_tools=["look"])
    state = create_agent(chat, [look], middleware=[search]).invoke(ask("Look."))
    assert state["messages"][1].tool_calls[0]["args"] == {"at": 2}


def test_tools_that_are_not_safe_run_only_for_the_winner(chat: ChatDendrite) -> None:
    """A path ends at their call."""
    looks = Looks()
    search = TreeSearch(width=10, depth=3, keep=2, score=three)
    create_agent(chat, [looks.tool], middleware=[search]).invoke(ask("Look."))
    assert looks.seen == [3]


def test_bad_use_is_named(chat: ChatDendrite) -> None:
    """Unknown tools, impossible sizes, scorers that fail."""
    with pytest.raises(RequestError, match="1 or more"):
        BestOfN(0)
    with pytest.raises(RequestError, match="1 or more of each"):
        TreeSearch(width=1, depth=0, keep=1, score=three)
    unknown = TreeSearch(width=2, depth=1, keep=1, score=three, safe_tools=["smell"])
    with pytest.raises(RequestError, match="smell"):
        create_agent(chat, [Looks().tool], middleware=[unknown]).invoke(ask("Look."))
    with pytest.raises(CallbackError, match="returned 'good'"):
        create_agent(chat, [], middleware=[BestOfN(2, score=lambda messages: "good")]).invoke(ask("Guess."))  # type: ignore[arg-type]  # on purpose
