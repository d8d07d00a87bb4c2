"""Tools bound to a call: which of them the model may or must call, as a grammar that lets it write nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from dendrite.engine.constraints import Constraint
from dendrite.engine.errors import ConstraintError, RequestError
from dendrite.engine.grammars import check_grammar
from dendrite.integrations.langchain.call_syntax import TAGGED, CallSyntax
from dendrite.integrations.langchain.schemas import closed

Choice = Literal["auto", "any", "none"]
_CHOICES: dict[object, Choice] = {
    None: "auto",
    False: "auto",
    True: "any",
    "auto": "auto",
    "any": "any",
    "required": "any",
    "none": "none",
}
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write JSON, in which a small model cannot lose itself in white space."""


@dataclass(frozen=True, slots=True)
class BoundTools:
    """Functions in OpenAI's form and what is to become of them."""

    functions: Sequence[Mapping[str, object]]
    choice: Choice
    """`auto`: text, calls or both; `any`: calls only."""
    is_parallel: bool
    """Whether one answer may hold several calls."""

    @classmethod
    def of(cls, tools: object, tool_choice: object, parallel: object) -> BoundTools | None:
        """What `bind_tools` bound; None when nothing may be called.

        `tool_choice` is "auto", "any" (or "required", True), "none", a function's name, or OpenAI's dict with one.
        Without `parallel` a forced answer is one call, and a free one as many as the model likes.

        Raises:
            RequestError: an unknown choice, or a name that none of the functions has.
            ConstraintError: a function whose schema cannot be compiled; names it.
        """
        functions = _functions(tools)
        if not functions:
            if _choice(tool_choice, [])[0] == "any":
                raise RequestError(f"tool_choice={tool_choice!r} asks for a call and no tools are bound")
            return None
        choice, name = _choice(tool_choice, functions)
        if choice == "none":
            return None
        if name is not None:
            functions = [function for function in functions if function["name"] == name]
        bound = cls(functions, choice, choice == "auto" if parallel is None else bool(parallel))
        for function in bound.functions:
            _check(function)
        return bound

    def constraint(self, syntax: CallSyntax) -> Constraint:
        """The grammar of an answer, in the model's syntax for calls."""
        return Constraint(grammar=_grammar(self, syntax))


def _functions(tools: object) -> list[Mapping[str, object]]:
    if tools is None:
        return []
    if not isinstance(tools, Sequence):
        raise RequestError(f"tools={tools!r} cannot be used: bind them with bind_tools([...])")
    for tool in tools:
        if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
            raise RequestError(f"tool {tool!r} is no function in OpenAI's form: bind it with bind_tools([...])")
    return [cast("Mapping[str, object]", tool["function"]) for tool in tools]


def _choice(tool_choice: object, functions: Sequence[Mapping[str, object]]) -> tuple[Choice, str | None]:
    """The kind of choice, and the one function it names."""
    if isinstance(tool_choice, Mapping):
        function = tool_choice.get("function")
        named = function if isinstance(function, Mapping) else tool_choice
        tool_choice = named.get("name", tool_choice.get("type"))
    names = [function["name"] for function in functions]
    if isinstance(tool_choice, str) and tool_choice in names:
        return "any", tool_choice
    if isinstance(tool_choice, str | bool | None) and tool_choice in _CHOICES:
        return _CHOICES[tool_choice], None
    raise RequestError(
        f"tool_choice={tool_choice!r} cannot be used: give 'auto', 'any', 'none' or one of the bound tools, {names}"
    )


def _check(function: Mapping[str, object]) -> None:
    name, parameters = function["name"], function.get("parameters") or {}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise ConstraintError(f"the arguments of tool {name!r} are no JSON object: give parameters of type 'object'")
    alone = BoundTools([function], "any", is_parallel=False)
    try:
        check_grammar(alone.constraint(TAGGED))
    except ConstraintError as error:
        raise ConstraintError(
            f"the arguments of tool {name!r} cannot be enforced: simplify its schema ({error})"
        ) from error


def _grammar(tools: BoundTools, syntax: CallSyntax) -> str:
    places = {f"#/$defs/{index}": function for index, function in enumerate(tools.functions)}
    arguments = [_arguments(function, place) for place, function in places.items()]
    calls = {
        "x-guidance": _ONE_LINE,
        "anyOf": [_call(function, place, syntax) for place, function in places.items()],
        "$defs": {str(index): schema for index, schema in enumerate(arguments)},
    }
    rules = [f"body: %json {json.dumps(calls)}"]
    opening, closing = json.dumps(syntax.opening), json.dumps(syntax.closing)
    tag = syntax.opening.rstrip()
    if tools.choice == "any":
        rules += [f"call: {opening} body {closing}" if tag else "call: body"]
        rules += ['start: call ("\\n" call)*' if tools.is_parallel and tag else "start: call"]
    elif tag:
        # Text runs up to the first tag, if there is one; behind a tag nothing but a call can follow.
        space = json.dumps(syntax.opening.removeprefix(tag))
        rules += [f"start: TEXT | (before {space} body {closing}){'+' if tools.is_parallel else ''} TEXT?"]
        rules += [f"before[lazy]: /(?s:.*){tag}/", f"TEXT: /(?s:.*)/ & ~/(?s:.*){tag}(?s:.*)/"]
    else:
        rules += ["start: TEXT | body", r'TEXT: /(?s:.*)/ & ~/\s*\{"name"(?s:.*)/']
    return "\n".join(rules)


def _call(function: Mapping[str, object], place: str, syntax: CallSyntax) -> dict[str, object]:
    """The schema of a call whose arguments are described at `place`."""
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, syntax.arguments: {"$ref": place}},
        "required": ["name", syntax.arguments],
        "additionalProperties": False,
    }


def _arguments(function: Mapping[str, object], place: str) -> dict[str, object]:
    parameters = cast("Mapping[str, object]", function.get("parameters") or {"properties": {}})
    schema = closed(parameters, at=place)
    return schema if "$ref" in schema else {"type": "object", **schema}
