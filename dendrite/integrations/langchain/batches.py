"""Many conversations at once: one batch of the engine, in the order given or as they are done, and no threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, nullcontext
from typing import Any, Literal, overload

from langchain_core.callbacks import Callbacks
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list

from dendrite.dsl.fronts import Waiter, iterated

Configs = RunnableConfig | Sequence[RunnableConfig] | None
Answered = tuple[int, AIMessage]
"""The index of an input, and its answer."""
Ended = tuple[int, AIMessage | Exception]


class BatchedChatModel(BaseChatModel):
    """A chat model whose asynchronous calls share the engine's steps: all ways to ask at once go through them."""

    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:
        """See `BaseChatModel.generate`; several conversations run in one batch of the engine."""
        if len(messages) == 1:
            return super().generate(messages, stop, callbacks, **kwargs)
        with Waiter() as waiter:
            return waiter.wait(self.agenerate(messages, stop, callbacks, **kwargs))

    def batch(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """See `Runnable.batch`; the inputs run in one batch of the engine, not in threads."""
        with Waiter() as waiter:
            return waiter.wait(self.abatch([*inputs], config, return_exceptions=return_exceptions, **kwargs))

    @overload
    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: Literal[False] = False,
        **kwargs: Any,
    ) -> Iterator[Answered]: ...
    @overload
    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: Literal[True],
        **kwargs: Any,
    ) -> Iterator[Ended]: ...
    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """See `Runnable.batch_as_completed`; one batch of the engine. Leaving the loop ends what still runs."""
        return iterated(self._as_completed(inputs, config, return_exceptions=return_exceptions, **kwargs))

    @overload
    def abatch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: Literal[False] = False,
        **kwargs: Any,
    ) -> AsyncIterator[Answered]: ...
    @overload
    def abatch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: Literal[True],
        **kwargs: Any,
    ) -> AsyncIterator[Ended]: ...
    async def abatch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        """See `Runnable.abatch_as_completed`; closing the iterator ends what still runs."""
        async with aclosing(self._as_completed(inputs, config, return_exceptions=return_exceptions, **kwargs)) as ended:
            async for one in ended:
                yield one

    async def _as_completed(
        self, inputs: Sequence[LanguageModelInput], config: Configs, *, return_exceptions: bool, **kwargs: Any
    ) -> AsyncGenerator[Ended]:
        configs = get_config_list(config, len(inputs))
        most = configs[0].get("max_concurrency") if configs else None
        turns = asyncio.Semaphore(most) if most else nullcontext()

        async def one(index: int) -> Ended:
            async with turns:
                try:
                    return index, await self.ainvoke(inputs[index], configs[index], **kwargs)
                except Exception as error:
                    if return_exceptions:
                        return index, error
                    raise

        pending = {asyncio.ensure_future(one(index)) for index in range(len(inputs))}
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for ended in sorted((task.result() for task in done), key=lambda ended: ended[0]):
                    yield ended
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
