r"""How a model writes tool calls: what tells it to, what the text of a call is, and the way back from text to calls.

Two ways are known, by the model's chat template; a model whose template knows no tools is told the first in words:

    tagged   <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>          Hermes, Qwen, SmolLM
    bare     {"name": "add", "parameters": {"a": 1}}                                    Llama 3
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from langchain_core.messages import InvalidToolCall, ToolCall
from langchain_core.messages.tool import invalid_tool_call, tool_call

from dendrite.engine.messages import Message


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """One way to write calls. A call is `opening`, JSON of a name and `arguments`, `closing`."""

    opening: str
    closing: str
    arguments: str
    """The JSON key of a call's arguments."""
    in_template: bool
    """Whether the model's own template writes tools, calls and their answers."""

    def prompt(self, tools: Sequence[Mapping[str, object]]) -> str:
        """What tells a model about tools whose template cannot."""
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        form = f'{self.opening}{{"name": <function name>, "{self.arguments}": <arguments as JSON>}}{self.closing}'
        return (
            "You can call functions. These are their signatures:\n"
            f"<tools>\n{listed}\n</tools>\n"
            f"To call one, answer with its name and arguments in this form:\n{form}"
        )

    def write(self, text: str, calls: Iterable[ToolCall]) -> str:
        """An assistant's turn with calls, as the model would have written it."""
        written = [
            self.opening
            + json.dumps({"name": call["name"], self.arguments: call["args"]}, ensure_ascii=False)
            + self.closing
            for call in calls
        ]
        return "\n".join([*([text] if text else []), *written])

    def answer(self, text: str, name: str | None) -> Message:
        """The turn that gives the model a tool's answer."""
        if not self.in_template:
            return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
        turn: Message = {"role": "tool", "content": text}
        if name:
            turn["name"] = name
        return turn


TAGGED = CallSyntax("<tool_call>\n", "\n</tool_call>", "arguments", in_template=True)
TOLD = CallSyntax("<tool_call>\n", "\n</tool_call>", "arguments", in_template=False)
BARE = CallSyntax("", "", "parameters", in_template=True)
_BARE_CALL = '{"name"'


def syntax_of(chat_template: str) -> CallSyntax:
    """How the model with this chat template writes calls."""
    if "tools" in chat_template and "<tool_call>" in chat_template:
        return TAGGED
    if "tools" in chat_template and '"parameters"' in chat_template and "<|python_tag|>" in chat_template:
        return BARE
    return TOLD


@dataclass(frozen=True, slots=True)
class SpokenCall:
    """A call as the model wrote it; `args` is JSON where it is valid."""

    id: str
    name: str | None
    args: str
    parsed: Mapping[str, object] | None = None
    error: str | None = None


@dataclass(slots=True)
class Dialogue:
    """An assistant's turn as it comes in, piece by piece: its text, and the calls in it.

    What may be the beginning of a call is held back until it is one or is not.
    """

    syntax: CallSyntax
    reads_calls: bool = True
    text: str = ""
    spoken: list[SpokenCall] = field(default_factory=list)
    _held: str = ""

    @classmethod
    def read(cls, syntax: CallSyntax, said: str) -> Self:
        """A whole turn."""
        dialogue = cls(syntax)
        dialogue.feed(said)
        dialogue.finish()
        return dialogue

    @property
    def calls(self) -> list[ToolCall]:
        """The whole, valid calls."""
        return [
            tool_call(name=call.name or "", args=dict(call.parsed), id=call.id)
            for call in self.spoken
            if call.parsed is not None
        ]

    @property
    def invalid(self) -> list[InvalidToolCall]:
        """What was begun as a call and is none, with the reason."""
        return [
            invalid_tool_call(name=call.name, args=call.args, id=call.id, error=call.error)
            for call in self.spoken
            if call.parsed is None
        ]

    def feed(self, piece: str) -> str:
        """Take more of the turn; the text that is safe to show now."""
        if not self.reads_calls:
            return self._show(piece)
        self._held += piece
        return self._show("".join(self._settled()))

    def finish(self) -> str:
        """The turn has ended: what is left is text, or a call that is not whole."""
        rest, self._held = self._held, ""
        if self._is_call(rest):
            self._add(rest.removeprefix(self._tag), whole=not self._tag)
            return ""
        return self._show(rest if rest.strip() or not self.spoken else "")

    @property
    def _tag(self) -> str:
        return self.syntax.opening.strip()

    def _is_call(self, text: str) -> bool:
        return text.startswith(self._tag) if self._tag else text.lstrip().startswith(_BARE_CALL)

    def _settled(self) -> Iterator[str]:
        """Text before, between and after whole calls, which are taken out of what is held."""
        if not self._tag:
            if not self._may_be_bare_call():
                text, self._held = self._held, ""
                yield text
            return
        while self._tag in self._held:
            before, _, after = self._held.partition(self._tag)
            if before.strip():
                yield before
            body, end, rest = after.partition(self.syntax.closing.strip())
            if not end:
                self._held = self._tag + after
                return
            self._add(body, whole=True)
            self._held = rest.lstrip("\n")
        hold = next((n for n in range(len(self._tag) - 1, 0, -1) if self._held.endswith(self._tag[:n])), 0)
        text, held = self._held[: len(self._held) - hold], self._held[len(self._held) - hold :]
        if text.strip() or not self.spoken:  # else it is the white space between two calls
            self._held = held
            yield text

    def _may_be_bare_call(self) -> bool:
        begun = self._held.lstrip()
        return not self.text and (_BARE_CALL.startswith(begun) or begun.startswith(_BARE_CALL))

    def _show(self, text: str) -> str:
        self.text += text
        return text

    def _add(self, body: str, *, whole: bool) -> None:
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        if not whole:
            self.spoken.append(SpokenCall(call_id, None, body.strip(), error="the call was cut off"))
            return
        try:
            found = json.loads(body)
            name, args = found["name"], found.get(self.syntax.arguments, {})
        except (ValueError, TypeError, KeyError, AttributeError):
            name, args = None, None
        if isinstance(name, str) and isinstance(args, dict):
            written = json.dumps(args, ensure_ascii=False)
            self.spoken.append(SpokenCall(call_id, name, written, parsed=args))
        else:
            error = "the call is no JSON object of a name and its arguments"
            self.spoken.append(SpokenCall(call_id, None, body.strip(), error=error))


def as_openai_calls(calls: Iterable[ToolCall]) -> list[dict[str, object]]:
    """Calls as chat templates read them."""
    return [{"type": "function", "function": {"name": call["name"], "arguments": call["args"]}} for call in calls]
