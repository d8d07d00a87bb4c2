"""What is generated onto one branch, as a chat model says it, for streams, callbacks and traces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from typing import Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, PrivateAttr

from dendrite.engine.branch import Branch
from dendrite.engine.config import SamplingOptions
from dendrite.engine.generation import Generation


class BranchSpeaker(BaseChatModel):
    """Generates onto `branch`, once, whatever it is asked; `stream` and `astream` alone."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    branch: Branch
    sampling: dict[str, Any]
    """`SamplingOptions`."""
    _ended: list[Generation] = PrivateAttr(default_factory=list)

    @property
    def generation(self) -> Generation:
        """What came out, once the stream has ended."""
        return self._ended[0]

    @property
    def _sampling(self) -> SamplingOptions:
        return cast("SamplingOptions", self.sampling)

    @property
    def _llm_type(self) -> str:
        return "dendrite-branch"

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        num_prompt = self.branch.num_tokens
        with closing(self.branch.engine.stream(self.branch, on_end=self._ended.append, **self._sampling)) as pieces:
            for piece in pieces:
                yield _chunk(piece)
        yield self._last(num_prompt)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        num_prompt = self.branch.num_tokens
        pieces = self.branch.engine.astream(self.branch, on_end=self._ended.append, **self._sampling)
        async with aclosing(pieces):
            async for piece in pieces:
                yield _chunk(piece)
        yield self._last(num_prompt)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        raise NotImplementedError("a branch is spoken once, as a stream")

    def _last(self, num_prompt: int) -> ChatGenerationChunk:
        """How it ended, and what it took."""
        num_generated = len(self.generation.token_ids)
        usage = UsageMetadata(
            input_tokens=num_prompt, output_tokens=num_generated, total_tokens=num_prompt + num_generated
        )
        metadata = {"finish_reason": self.generation.finish_reason, "model_name": self.branch.engine.name}
        message = AIMessageChunk(content="", usage_metadata=usage, response_metadata=metadata, chunk_position="last")
        return ChatGenerationChunk(message=message)


def _chunk(piece: str) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=piece))
