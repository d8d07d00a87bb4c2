"""Tools and structured output of `ChatDendrite`: enforced by grammar, read back from text, refused when impossible."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.tools import tool
from pydantic import BaseModel

from dendrite.engine.engine import Engine
from dendrite.engine.errors import ConstraintError, RequestError
from dendrite.engine.grammars import check_grammar
from dendrite.integrations.langchain import ChatDendrite
from dendrite.integrations.langchain.bound_tools import BoundTools
from dendrite.integrations.langchain.call_syntax import BARE, TAGGED, TOLD, Dialogue, syntax_of
from dendrite.integrations.langchain.schemas import closed
from dendrite.testing import scripted_engine


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def greet(name: str) -> str:
    """Greet somebody."""
    return f"Hello {name}"


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
GREETING = '<tool_call>\n{"name": "greet", "arguments": {"name": "こんにちは"}}\n</tool_call>'


def script(text: str) -> str:
    question = text.rpartition("<|user|>")[2].partition("<|end|>")[0]
    return {
        "Chat.": "No need to call.",
        "Call.": "Sure.\n" + CALL,
        "Both.": CALL + "\n" + GREETING,
        "Cut.": CALL[:30],
        "Add.": CALL,
        "Greet.": GREETING,
        "Json.": '{"a": 3, "b": 4}',
    }.get(question, "nothing")


@pytest.fixture
def engine() -> Iterator[Engine]:
    with scripted_engine(script) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats().branches == 0


@pytest.fixture
def chat(engine: Engine) -> ChatDendrite:
    return ChatDendrite(engine=engine, temperature=0)


def calls_of(message: object) -> list[tuple[str, dict[str, Any]]]:
    assert isinstance(message, AIMessage)
    return [(call["name"], call["args"]) for call in message.tool_calls]


ADDED = ("add", {"a": 1, "b": 2})
GREETED = ("greet", {"name": "こんにちは"})


def test_a_free_choice_gives_text_calls_or_both(chat: ChatDendrite) -> None:
    """The text before a call stays text; several calls are several."""
    free = chat.bind_tools([add, greet])
    said = free.invoke("Chat.")
    assert (said.text, said.tool_calls) == ("No need to call.", [])
    mixed = free.invoke("Call.")
    assert (mixed.text, calls_of(mixed)) == ("Sure.\n", [ADDED])
    assert mixed.response_metadata["finish_reason"] == "tool_calls"
    assert calls_of(free.invoke("Both.")) == [ADDED, GREETED]


def test_a_forced_choice_is_a_call(chat: ChatDendrite) -> None:
    """The grammar lets the model write nothing but one call, of an allowed tool; several only if they are asked for."""
    forced = chat.bind_tools([add, greet], tool_choice="any")
    assert calls_of(forced.invoke("Add.")) == [ADDED]
    assert calls_of(forced.invoke("Both.")) == [ADDED]
    assert forced.invoke("Chat.", max_tokens=60).text == ""
    assert calls_of(chat.bind_tools([add, greet], tool_choice="greet").invoke("Greet.")) == [GREETED]
    several = chat.bind_tools([add, greet], tool_choice="any", parallel_tool_calls=True)
    assert len(calls_of(several.invoke("Both."))) > 1


def test_a_stream_gives_text_as_it_comes_and_calls_whole(chat: ChatDendrite) -> None:
    """The chunks add up to the message that `invoke` gives, but for the ids of the calls."""
    free = chat.bind_tools([add, greet])
    whole: AIMessageChunk | None = None
    for chunk in free.stream("Both."):
        assert isinstance(chunk, AIMessageChunk)
        assert "<tool" not in chunk.text
        whole = chunk if whole is None else whole + chunk
    assert calls_of(whole) == [ADDED, GREETED]
    assert whole is not None
    assert whole.additional_kwargs == free.invoke("Both.").additional_kwargs


def test_a_cut_call_is_no_call(chat: ChatDendrite) -> None:
    """It is told as invalid, with the reason, and never as a call with half its arguments."""
    cut = chat.bind_tools([add]).invoke("Add.", max_tokens=40)
    assert cut.tool_calls == []
    assert cut.invalid_tool_calls[0]["error"] == "the call was cut off"
    assert cut.response_metadata["finish_reason"] == "length"


def test_calls_keep_their_tokens_in_the_next_turn(chat: ChatDendrite) -> None:
    """A conversation with a call goes on from the tokens of that call."""
    free = chat.bind_tools([add])
    asked = free.invoke("Call.")
    (call,) = asked.tool_calls
    answered = free.invoke([("user", "Call."), asked, add.invoke(call)])
    assert asked.usage_metadata is not None
    assert answered.usage_metadata is not None
    assert answered.usage_metadata["input_token_details"]["cache_read"] >= asked.usage_metadata["total_tokens"] - 1


def test_impossible_tools_are_refused_when_they_are_bound(chat: ChatDendrite) -> None:
    """A schema that cannot be compiled and a choice that is none are errors that name what is wrong."""
    odd = {"name": "odd", "description": "", "parameters": {"type": "object", "properties": {"x": {"type": "wrong"}}}}
    with pytest.raises(ConstraintError, match="'odd'"):
        chat.bind_tools([odd])
    with pytest.raises(RequestError, match=r"'sub'.*add"):
        chat.bind_tools([add], tool_choice="sub")
    with pytest.raises(RequestError, match="no tools are bound"):
        chat.bind_tools([], tool_choice="any")


def schema_of(**properties: object) -> dict[str, object]:
    return {"type": "object", "properties": properties, "required": [*properties]}


INTEGER = {"type": "integer"}


@pytest.mark.parametrize(
    "parameters",
    [
        {**schema_of(x={"$ref": "#/$defs/a~1b"}), "$defs": {"a/b": INTEGER}},
        {**schema_of(x={"$ref": "#/$defs/Größe"}), "$defs": {"Größe": INTEGER}},
        {**schema_of(x={"$ref": "#/definitions/T"}), "definitions": {"T": INTEGER}},
        {**schema_of(x={"$ref": "#/properties/y"}, y=INTEGER)},
        {"$ref": "#/$defs/All", "$defs": {"All": schema_of(x=INTEGER)}},
        {"allOf": [schema_of(x=INTEGER), schema_of(y=INTEGER)]},
        schema_of(x={"type": "string", "format": "path"}),
        schema_of(x={"type": "array", "items": INTEGER, "uniqueItems": False}),
        schema_of(x={"description": "None, or '#/$defs/T'.", "type": "null"}),
        {},
    ],
    ids=["slash", "unicode", "draft 7", "property", "all by reference", "all of", "format", "unique", "text", "none"],
)
@pytest.mark.parametrize("name", ["odd", "größe 日本", 'a/b~"c'])
def test_odd_schemas_and_names_are_enforced(parameters: dict[str, object], name: str) -> None:
    """References are found wherever the schema stands, and remarks do not count."""
    function = {"name": name, "parameters": parameters}
    bound = BoundTools.of([{"type": "function", "function": function}] * 2, "any", None)
    assert bound is not None
    check_grammar(bound.constraint(TAGGED))


@pytest.mark.parametrize("parameters", [True, {"type": "array"}, {"type": "string"}])
def test_arguments_are_an_object(chat: ChatDendrite, parameters: object) -> None:
    """Anything else could not be a call, and is refused when it is bound."""
    with pytest.raises(ConstraintError, match="'odd' are no JSON object"):
        chat.bind_tools([{"type": "function", "function": {"name": "odd", "parameters": parameters}}])


def test_a_tool_that_refers_to_itself_nests_its_arguments(chat: ChatDendrite) -> None:
    """What a schema calls its root is the arguments, not the call around them."""
    parameters = {"type": "object", "properties": {"below": {"$ref": "#"}, "name": {"const": "x"}}}
    nested = {"below": {"name": "x"}, "name": "x"}
    said = json.dumps({"name": "odd", "arguments": nested})
    with scripted_engine(lambda text: f"<tool_call>\n{said}\n</tool_call>") as engine:
        odd = {"type": "function", "function": {"name": "odd", "parameters": parameters}}
        forced = ChatDendrite(engine=engine, temperature=0).bind_tools([odd], tool_choice="any")
        assert calls_of(forced.invoke("Call.")) == [("odd", nested)]


def test_closing_a_schema_leaves_values_and_names_alone() -> None:
    """What only looks like a schema, and properties that are called like keywords, stay what they are."""
    value = {"properties": "a", "format": "odd", "$ref": "#/x"}
    schema = schema_of(properties=INTEGER, enum={"enum": [value], "default": value, "const": value})
    before = json.dumps(schema)
    made = closed(schema)
    assert json.dumps(schema) == before
    assert made == {**schema, "additionalProperties": False}


class Pair(BaseModel):
    a: int
    b: int


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output_in_every_method(chat: ChatDendrite, method: Any) -> None:
    """Pydantic models come back as such, with the raw message if asked."""
    question = "Json." if method != "function_calling" else "Add."
    named = {"title": "add", "description": "", **Pair.model_json_schema()} | {"title": "add"}
    schema: Any = Pair if method != "function_calling" else named
    structured = chat.with_structured_output(schema, method=method, include_raw=True)
    result = structured.invoke(question)
    assert result["parsing_error"] is None
    wanted = {"json_schema": Pair(a=3, b=4), "json_mode": Pair(a=3, b=4), "function_calling": {"a": 1, "b": 2}}
    assert result["parsed"] == wanted[method]
    assert chat.with_structured_output(schema, method=method).invoke(question) == wanted[method]


def test_structured_output_holds_what_the_model_would_not(chat: ChatDendrite) -> None:
    """Text that is no JSON at all becomes JSON of the schema."""
    schema = {"title": "Verdict", "type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"]}
    answer = chat.with_structured_output(schema, include_raw=True).invoke("Chat.")
    assert json.loads(answer["raw"].text).keys() == {"good"}


def test_unknown_methods_are_refused(chat: ChatDendrite) -> None:
    """With the ones there are."""
    with pytest.raises(RequestError, match="json_schema, function_calling, json_mode"):
        chat.with_structured_output(Pair, method="yaml")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(RequestError, match="needs a schema"):
        chat.with_structured_output(method="json_schema")


@pytest.mark.parametrize("cut", range(1, len(GREETING), 7))
def test_a_dialogue_reads_pieces_as_it_reads_the_whole(cut: int) -> None:
    """However the text is cut, the same text and calls come out."""
    said = "Sure.\n" + CALL + "\n" + GREETING + " Done."
    dialogue = Dialogue(TAGGED)
    shown = "".join(dialogue.feed(said[i : i + cut]) for i in range(0, len(said), cut)) + dialogue.finish()
    assert shown == dialogue.text == Dialogue.read(TAGGED, said).text == "Sure.\n Done."
    assert [call["name"] for call in dialogue.calls] == ["add", "greet"]


def test_bare_calls_are_read_too() -> None:
    """Llama's form has no tags: JSON that begins with a name is a call, other JSON is text."""
    call = Dialogue.read(BARE, '{"name": "add", "parameters": {"a": 1}}')
    assert [(c["name"], c["args"]) for c in call.calls] == [("add", {"a": 1})]
    assert Dialogue.read(BARE, '{"value": 1}').text == '{"value": 1}'


def test_syntax_follows_the_chat_template() -> None:
    """A template that knows no tools gets them told."""
    assert syntax_of("{{ tools }} <tool_call>") is TAGGED
    assert syntax_of('{{ tools }} "parameters" <|python_tag|>') is BARE
    assert syntax_of("{{ messages }}") is TOLD


@pytest.mark.parametrize("syntax", [TAGGED, TOLD, BARE])
@pytest.mark.parametrize("choice", ["auto", "any", "node"])
def test_schemas_with_definitions_compile(syntax: Any, choice: str) -> None:
    """Recursive definitions of several tools under one name do not meet."""
    node = {
        "$defs": {
            "N": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}}}
        },
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/N"}},
        "required": ["n"],
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": node}} for name in ("node", "other")]
    bound = BoundTools.of(tools, choice, None)
    assert bound is not None
    check_grammar(bound.constraint(syntax))
