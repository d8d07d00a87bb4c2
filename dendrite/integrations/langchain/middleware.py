"""Middleware for `langchain.agents.create_agent` (extra: `pip install dendrite-engine[agents]`).

    create_agent(ChatDendrite(...), tools, middleware=[BestOfN(8, score=...)])

Candidates are forks of one prompt. Only the winner becomes the agent's message, so its tools run once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from langchain.agents.middleware.types import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.messages import AIMessage, BaseMessage, ToolCall, ToolMessage
from langchain_core.tools import BaseTool

from dendrite.dsl.fronts import Waiter
from dendrite.engine.errors import RequestError
from dendrite.integrations.langchain.candidates import Scorer, likelihood, proposed, scored

Handler = Callable[[ModelRequest[Any]], ModelResponse[Any]]
AsyncHandler = Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]


class _Choosing(AgentMiddleware[Any, Any, Any]):
    """Answers a model call with the best of several candidates, for sync and async agents."""

    async def _chosen(self, request: ModelRequest[Any]) -> AIMessage:
        raise NotImplementedError

    def wrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Handler,  # noqa: ARG002 - the model is called here
    ) -> ModelResponse[Any]:
        """Choose in place of the agent's own call of the model."""
        with Waiter() as waiter:
            return ModelResponse(result=[waiter.wait(self._chosen(request))])

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: AsyncHandler,  # noqa: ARG002 - as above
    ) -> ModelResponse[Any]:
        """The same for async agents."""
        return ModelResponse(result=[await self._chosen(request)])


class BestOfN(_Choosing):
    """Takes the best of `n` candidates for each message of the agent.

    Args:
        n: candidates.
        score: rates a conversation that ends in a candidate; without it the one the model is surest of wins.
    """

    def __init__(self, n: int, *, score: Scorer | None = None) -> None:
        super().__init__()
        if n < 1:
            raise RequestError(f"BestOfN({n}): give 1 or more")
        self._n = n
        self._score = score

    async def _chosen(self, request: ModelRequest[Any]) -> AIMessage:
        asked = request if self._score is not None else _with_logprobs(request)
        (candidates,) = await proposed(asked, [request.messages], self._n)
        conversations = [[*request.messages, candidate] for candidate in candidates]
        values = await asyncio.gather(*(scored(self._score or likelihood, each) for each in conversations))
        return candidates[values.index(max(values))]


@dataclass(frozen=True, slots=True)
class _Path:
    """A way the conversation could go on."""

    messages: Sequence[BaseMessage]
    first: AIMessage
    """What the agent would say now."""
    value: float
    is_open: bool


class TreeSearch(_Choosing):
    """Looks some messages ahead before the agent says the next one.

    Each candidate is followed for `depth` messages, in all `width` ways, the `keep` best of them at a time. Tools that
    are marked safe run on the way; a call of any other tool ends its path, and runs when the agent makes it.

    Args:
        width: candidates for each next message.
        depth: messages to look ahead, the first one counted.
        keep: paths that go on at each depth.
        score: rates a conversation; the path it likes best decides what is said now.
        safe_tools: names of tools without side effects, which need nothing but their arguments. Where one raises, the
            candidate that called it is told so, and is rated like the others.
    """

    def __init__(self, *, width: int, depth: int, keep: int, score: Scorer, safe_tools: Collection[str] = ()) -> None:
        super().__init__()
        if min(width, depth, keep) < 1:
            raise RequestError(f"TreeSearch(width={width}, depth={depth}, keep={keep}): give 1 or more of each")
        self._width, self._depth, self._keep = width, depth, keep
        self._score = score
        self._safe = frozenset(safe_tools)

    async def _chosen(self, request: ModelRequest[Any]) -> AIMessage:
        tools = {tool.name: tool for tool in request.tools if isinstance(tool, BaseTool)}
        if unknown := self._safe - tools.keys():
            raise RequestError(f"safe_tools names {sorted(unknown)}, and the agent's tools are {sorted(tools)}")
        (candidates,) = await proposed(request, [request.messages], self._width)
        paths = await self._followed(tools, [(request.messages, None, candidate) for candidate in candidates])
        for _ in range(self._depth - 1):
            open_paths = [path for path in paths if path.is_open]
            if not open_paths:
                break
            families = await proposed(request, [path.messages for path in open_paths], self._width)
            steps = [
                (path.messages, path.first, candidate)
                for path, family in zip(open_paths, families, strict=True)
                for candidate in family
            ]
            ended = [path for path in paths if not path.is_open]
            paths = self._best([*ended, *await self._followed(tools, steps)])
        return self._best(paths)[0].first

    async def _followed(
        self, tools: dict[str, BaseTool], steps: Sequence[tuple[Sequence[BaseMessage], AIMessage | None, AIMessage]]
    ) -> list[_Path]:
        return list(await asyncio.gather(*(self._follow(tools, *step) for step in steps)))

    async def _follow(
        self, tools: dict[str, BaseTool], before: Sequence[BaseMessage], first: AIMessage | None, candidate: AIMessage
    ) -> _Path:
        """Say the candidate, and run its tools if all of them are safe."""
        messages = [*before, candidate]
        calls = candidate.tool_calls
        goes_on = bool(calls) and all(call["name"] in self._safe for call in calls)
        if goes_on:
            messages += await asyncio.gather(*(_answer(tools[call["name"]], call) for call in calls))
        return _Path(messages, first or candidate, await scored(self._score, messages), goes_on)

    def _best(self, paths: Sequence[_Path]) -> list[_Path]:
        return sorted(paths, key=lambda path: -path.value)[: self._keep]


async def _answer(tool: BaseTool, call: ToolCall) -> ToolMessage:
    """What the tool says to a candidate."""
    try:
        said: object = await tool.ainvoke(call)
    except Exception as error:  # noqa: BLE001 - one of several candidates called it wrongly: the agent's turn goes on
        text = f"{type(error).__name__}: {error}"
        return ToolMessage(text, tool_call_id=call["id"], name=tool.name, status="error")
    return said if isinstance(said, ToolMessage) else ToolMessage(str(said), tool_call_id=call["id"], name=tool.name)


def _with_logprobs(request: ModelRequest[Any]) -> ModelRequest[Any]:
    return request.override(model_settings={**request.model_settings, "logprobs": True})
