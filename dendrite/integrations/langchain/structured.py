"""What `with_structured_output` puts behind a chat model: what is bound to its calls, and what parses their answers."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Literal

from langchain_core.messages import AIMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from dendrite.engine.errors import RequestError

Method = Literal["json_schema", "function_calling", "json_mode"]
METHODS: tuple[Method, ...] = ("json_schema", "function_calling", "json_mode")
Schema = Mapping[str, object] | type


def response_format(schema: Schema | None, method: Method) -> dict[str, object]:
    """What is bound as `response_format` for a method that works on the answer's text."""
    if method == "json_mode":
        return {"type": "json_object"}
    described = convert_to_json_schema(_known(schema, method))
    return {"type": "json_schema", "json_schema": {"name": str(described.get("title", "answer")), "schema": described}}


def tracing_format(schema: Schema | None, method: Method) -> dict[str, object]:
    """What is bound for traces; nothing without a schema."""
    if schema is None:
        return {}
    return {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": schema}}


def parser(schema: Schema | None, method: Method) -> BaseOutputParser[Any]:
    """What makes the schema's type of an answer."""
    is_pydantic = isinstance(schema, type) and is_basemodel_subclass(schema)
    if method != "function_calling":
        return PydanticOutputParser(pydantic_object=schema) if is_pydantic else JsonOutputParser()
    if is_pydantic:
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    return JsonOutputKeyToolsParser(key_name=function_name(schema), first_tool_only=True)


def function_name(schema: Schema | None) -> str:
    """The name of the function that a schema is as a tool."""
    return str(convert_to_openai_tool(_known(schema, "function_calling"))["function"]["name"])


def parsed(model: Runnable[Any, AIMessage], parse: BaseOutputParser[Any], *, include_raw: bool) -> Runnable[Any, Any]:
    """The chain; with `include_raw` it gives `raw`, `parsed` and `parsing_error`, and never raises for bad JSON."""
    if not include_raw:
        return model | parse
    good = RunnablePassthrough.assign(parsed=itemgetter("raw") | parse, parsing_error=lambda _: None)
    bad = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | good.with_fallbacks([bad], exception_key="parsing_error")


def _known(schema: Schema | None, method: Method) -> Any:  # noqa: ANN401 - LangChain's converters take dicts and types
    if schema is None:
        raise RequestError(f"method={method!r} needs a schema: give one, or take method='json_mode'")
    return schema


def checked_method(method: object) -> Method:
    """The method, if there is such a one."""
    for known in METHODS:
        if method == known:
            return known
    raise RequestError(f"method={method!r} cannot be used: give one of {', '.join(METHODS)}")
