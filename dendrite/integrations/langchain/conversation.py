"""LangChain's messages as the engine's: text only, calls as the model writes them, generated turns by their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, FunctionMessage, ToolMessage

from dendrite.engine.errors import RequestError
from dendrite.engine.messages import Message, Role
from dendrite.engine.text import Tokenizer
from dendrite.integrations.langchain.call_syntax import CallSyntax, Dialogue, as_openai_calls

KEPT = "dendrite"
"""The key of `AIMessage.additional_kwargs` under which a message keeps the tokens it was generated as."""

_ROLES: dict[str, Role] = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"}
_UNSAID = frozenset({"tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "reasoning", "thinking"})
"""Blocks of an assistant's turn that are no text: its calls travel in `tool_calls`, its thoughts are not repeated."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Renders messages for one model: `model` and `tokenizer` are the engine's."""

    model: str
    tokenizer: Tokenizer
    syntax: CallSyntax

    def token_ids(
        self,
        messages: Sequence[BaseMessage],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        instruction: str = "",
    ) -> list[int]:
        """The prompt's tokens, up to where the assistant is to speak.

        Args:
            messages: the conversation.
            tools: functions in OpenAI's form, told to the model in the form its template has for them.
            instruction: what else it is to heed, put into the system turn.

        Raises:
            RequestError: a message that a text model cannot read; says which and why.
        """
        turns = [self._turn(index, message) for index, message in enumerate(messages)]
        by_template = tools if self.syntax.in_template else ()
        texts = [self.syntax.prompt(tools) if tools and not by_template else "", instruction]
        return self.tokenizer.render(_instructed(turns, [text for text in texts if text]), tools=by_template)

    def keep(self, token_ids: Sequence[int]) -> dict[str, object]:
        """What a message of this model keeps of its tokens."""
        return {KEPT: {"model": self.model, "token_ids": list(token_ids)}}

    def _turn(self, index: int, message: BaseMessage) -> Message:
        text = _text(index, message)
        if isinstance(message, AIMessage):
            return self._assistant_turn(message, text)
        if isinstance(message, ToolMessage | FunctionMessage):
            return self.syntax.answer(text, message.name)
        if isinstance(message, ChatMessage):
            if message.role not in _ROLES.values():
                known = ", ".join(sorted(set(_ROLES.values())))
                raise RequestError(f"messages[{index}] has role {message.role!r}: give one of {known}")
            return {"role": message.role, "content": text}  # type: ignore[typeddict-item]  # checked above
        if message.type not in _ROLES:
            raise RequestError(f"messages[{index}] is a {type(message).__name__}: a chat model cannot read it")
        return {"role": _ROLES[message.type], "content": text}

    def _assistant_turn(self, message: AIMessage, text: str) -> Message:
        token_ids = self._kept_ids(message)
        if token_ids:
            said = self.tokenizer.decode(token_ids)
            if self._says(said, message, text):
                return {"role": "assistant", "content": said, "token_ids": token_ids}
        if not message.tool_calls:
            return {"role": "assistant", "content": text}
        if self.syntax.in_template:
            return {"role": "assistant", "content": text, "tool_calls": as_openai_calls(message.tool_calls)}
        return {"role": "assistant", "content": self.syntax.write(text, message.tool_calls)}

    def _kept_ids(self, message: AIMessage) -> list[int]:
        """The tokens the message was generated as; none where it was made elsewhere, or what it kept was changed."""
        kept = message.additional_kwargs.get(KEPT)
        if not isinstance(kept, Mapping) or kept.get("model") != self.model:
            return []
        token_ids = kept.get("token_ids")
        known = range(self.tokenizer.vocab_size)
        if not isinstance(token_ids, list) or not all(isinstance(each, int) and each in known for each in token_ids):
            return []
        return token_ids

    def _says(self, said: str, message: AIMessage, text: str) -> bool:
        """Whether the message still says what its tokens do: users may edit it."""
        calls = [(call["name"], call["args"]) for call in message.tool_calls]
        if not calls and not message.invalid_tool_calls:
            return said == text
        spoken = Dialogue.read(self.syntax, said)
        return spoken.text == text and [(call["name"], call["args"]) for call in spoken.calls] == calls


def _instructed(turns: list[Message], texts: Sequence[str]) -> list[Message]:
    """The turns with `texts` at the end of the first system turn, or as one of their own."""
    if not texts:
        return turns
    if turns and turns[0]["role"] == "system":
        return [{"role": "system", "content": "\n\n".join([turns[0]["content"], *texts])}, *turns[1:]]
    return [{"role": "system", "content": "\n\n".join(texts)}, *turns]


def _text(index: int, message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(_block_text(index, message, block) for block in message.content)


def _block_text(index: int, message: BaseMessage, block: object) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type", "unknown") if isinstance(block, Mapping) else type(block).__name__
    if isinstance(block, Mapping) and kind in ("text", "text-plain") and isinstance(block.get("text"), str):
        return str(block["text"])
    if isinstance(message, AIMessage) and kind in _UNSAID:
        return ""
    raise RequestError(
        f"messages[{index}] holds a block of type {kind!r}, and this model reads text only: leave the block out, or "
        "describe it in words"
    )
