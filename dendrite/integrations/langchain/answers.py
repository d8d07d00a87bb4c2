"""From the engine's generations to LangChain's messages: text, calls, usage, log-probabilities, why it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from dendrite.engine.generation import Generation
from dendrite.engine.text import Tokenizer
from dendrite.integrations.langchain.call_syntax import Dialogue
from dendrite.integrations.langchain.conversation import Conversation

PROVIDER = "dendrite"

_FINISH_REASONS = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "cancelled": "cancelled",
    "constraint": "constraint",
}


@dataclass(frozen=True, slots=True)
class Answers:
    """Makes the messages of one call."""

    conversation: Conversation
    num_prompt: int
    """Tokens of the prompt."""
    num_cached: int
    """How many of them had their K/V before the call."""
    reads_calls: bool
    """Whether tools were bound; without them nothing the model writes is a call."""
    with_logprobs: bool

    def result(self, generations: Sequence[Generation]) -> ChatResult:
        """All answers of the call, and their usage together."""
        chats = [self._chat(index, generation) for index, generation in enumerate(generations)]
        num_generated = sum(len(generation.token_ids) for generation in generations)
        usage = {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": self.num_prompt + num_generated,
        }
        return ChatResult(
            generations=chats,
            llm_output={
                "token_usage": usage,
                "model_name": self.conversation.model,
                "model_provider": PROVIDER,
            },
        )

    def _chat(self, index: int, generation: Generation) -> ChatGeneration:
        dialogue = self.dialogue()
        dialogue.feed(generation.text)
        dialogue.finish()
        message = AIMessage(
            content=dialogue.text,
            tool_calls=dialogue.calls,
            invalid_tool_calls=dialogue.invalid,
            usage_metadata=self._usage(index, generation),
            response_metadata=self._metadata(generation, dialogue),
            additional_kwargs=self.conversation.keep(generation.token_ids),
        )
        return ChatGeneration(message=message)

    # --- streaming ---------------------------------------------------------------------------------------------

    def dialogue(self) -> Dialogue:
        """What reads an answer as it comes in."""
        return Dialogue(self.conversation.syntax, reads_calls=self.reads_calls)

    def streamed(self) -> StreamedAnswer:
        """What makes chunks of the call's one answer."""
        return StreamedAnswer(self, self.dialogue())

    def last_chunk(self, generation: Generation, dialogue: Dialogue) -> ChatGenerationChunk:
        """What is known once the answer has ended."""
        message = AIMessageChunk(
            content="",
            usage_metadata=self._usage(0, generation),
            response_metadata=self._metadata(generation, dialogue),
            additional_kwargs=self.conversation.keep(generation.token_ids),
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)

    # --- what goes with a message ------------------------------------------------------------------------------

    def _usage(self, index: int, generation: Generation) -> UsageMetadata:
        """The first answer of a call pays for the prompt; the others find all of it in the cache."""
        num_generated = len(generation.token_ids)
        return UsageMetadata(
            input_tokens=self.num_prompt,
            output_tokens=num_generated,
            total_tokens=self.num_prompt + num_generated,
            input_token_details=InputTokenDetails(cache_read=self.num_prompt if index else self.num_cached),
        )

    def _reason(self, generation: Generation, dialogue: Dialogue) -> str:
        if dialogue.calls and generation.finish_reason in ("eos", "stop"):
            return "tool_calls"
        return _FINISH_REASONS[generation.finish_reason]

    def _metadata(self, generation: Generation, dialogue: Dialogue) -> dict[str, object]:
        metadata: dict[str, object] = {
            "model_name": self.conversation.model,
            "model_provider": PROVIDER,
            "finish_reason": self._reason(generation, dialogue),
        }
        if self.with_logprobs:
            metadata["logprobs"] = {"content": list(_logprobs(self.conversation.tokenizer, generation))}
        return metadata


@dataclass(slots=True)
class StreamedAnswer:
    """An answer on its way as chunks: text as it comes, each call once it is whole, the rest at the end."""

    answers: Answers
    dialogue: Dialogue
    _num_told: int = 0

    def feed(self, piece: str) -> Iterator[ChatGenerationChunk]:
        """The chunks that a new piece of text makes safe to show."""
        return self._chunks(self.dialogue.feed(piece))

    def finish(self, generation: Generation) -> Iterator[ChatGenerationChunk]:
        """What was held back, then the last chunk with usage and metadata."""
        yield from self._chunks(self.dialogue.finish())
        yield self.answers.last_chunk(generation, self.dialogue)

    def _chunks(self, text: str) -> Iterator[ChatGenerationChunk]:
        if text:
            yield ChatGenerationChunk(message=AIMessageChunk(content=text))
        for index, call in enumerate(self.dialogue.spoken[self._num_told :], start=self._num_told):
            chunk = tool_call_chunk(name=call.name, args=call.args, id=call.id, index=index)
            yield ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=[chunk]))
        self._num_told = len(self.dialogue.spoken)


def _logprobs(tokenizer: Tokenizer, generation: Generation) -> Iterator[dict[str, object]]:
    """Each sampled token with its log-probability and the likeliest in its place, in OpenAI's form."""
    tops = generation.top_logprobs or ((),) * len(generation.logprobs)
    for token_id, logprob, top in zip(generation.token_ids, generation.logprobs, tops, strict=False):
        likeliest = [_logprob(tokenizer, other, value) for other, value in top]
        yield {**_logprob(tokenizer, token_id, logprob), "top_logprobs": likeliest}


def _logprob(tokenizer: Tokenizer, token_id: int, value: float) -> dict[str, object]:
    text = tokenizer.decode([token_id], special=True)
    return {"token": text, "token_id": token_id, "logprob": value, "bytes": list(text.encode())}
