"""Several next messages of an agent: proposed in one batch of the engine, out of one prompt each."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from langchain.agents.middleware.types import ModelRequest
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration
from langchain_core.runnables import RunnableBinding

from dendrite.engine.errors import CallbackError, RequestError
from dendrite.integrations.langchain.chat_model import ChatDendrite

Scorer = Callable[[Sequence[BaseMessage]], float] | Callable[[Sequence[BaseMessage]], Awaitable[float]]
"""From a conversation that ends in a candidate, or what followed on one, to how good that is; sync or async."""


async def proposed(
    request: ModelRequest[Any], conversations: Sequence[Sequence[BaseMessage]], n: int
) -> list[list[AIMessage]]:
    """`n` candidates for each conversation, with the request's tools and settings.

    Raises:
        RequestError: the agent's model is no `ChatDendrite`, or it asks for structured output.
    """
    model = request.model
    if not isinstance(model, ChatDendrite):
        raise RequestError(f"this middleware needs a ChatDendrite, and the agent's model is a {type(model).__name__}")
    if request.response_format is not None:
        raise RequestError("this middleware chooses among messages: leave the agent's response_format out")
    bound: dict[str, Any] = dict(request.model_settings)
    if request.tools:
        binding = model.bind_tools(request.tools, tool_choice=request.tool_choice)
        bound |= cast("RunnableBinding[Any, Any]", binding).kwargs
    before = [request.system_message] if request.system_message is not None else []
    asked = [[*before, *conversation] for conversation in conversations]
    # Without callbacks: candidates that lose are nobody's business, and the winner is told as the agent's own message.
    result = await model.agenerate(asked, n=n, **bound)
    return [
        [cast("AIMessage", cast("ChatGeneration", generation).message) for generation in generations]
        for generations in result.generations
    ]


async def scored(score: Scorer, conversation: Sequence[BaseMessage]) -> float:
    """What the scorer says.

    Raises:
        CallbackError: it raised, or said something that is no number.
    """
    try:
        value: object = score(conversation)
        if inspect.isawaitable(value):
            value = await value
    except Exception as error:
        raise CallbackError(f"the scorer of candidates raised {type(error).__name__}: {error}") from error
    if not isinstance(value, int | float) or math.isnan(value):
        raise CallbackError(f"the scorer of candidates returned {value!r}: return a number")
    return float(value)


def likelihood(conversation: Sequence[BaseMessage]) -> float:
    """The mean log-probability of the last message's tokens: what the model itself is surest of."""
    last = conversation[-1]
    content = last.response_metadata.get("logprobs", {}).get("content", ())
    return sum(entry["logprob"] for entry in content) / len(content) if content else -float("inf")
