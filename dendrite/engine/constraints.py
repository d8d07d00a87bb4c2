"""What a generated text must be: a JSON schema, a regular expression, a grammar, or one of several choices.

The record is light and is made anywhere, without an engine; `grammars.py` compiles it for one engine's tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast, runtime_checkable

from dendrite.engine.errors import ConstraintError

Kind = Literal["schema", "regex", "grammar", "choices"]
CONTINUE: Literal["continue"] = "continue"
"""As `constraint=`: go on under the constraint of the branch's last generation, from where `max_tokens` ended it."""

_SHOWN = 60


@dataclass(frozen=True, slots=True, init=False)
class Constraint:
    r"""What the whole text of a generation must match. Give exactly one of the four.

        branch.generate(constraint=dd.Constraint(regex=r"\d{4}-\d\d-\d\d"))
        branch.generate(constraint=dd.Constraint(choices=[" yes", " no"]))
        branch.generate(constraint=dd.Constraint(schema=Person))     # a pydantic model, or a JSON schema as a dict

    Equal constraints compare equal, and an engine compiles them once.
    """

    kind: Kind
    source: str
    """The regular expression or grammar as given; a schema or the choices as JSON."""

    def __init__(
        self,
        *,
        schema: type | Mapping[str, object] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choices: Sequence[str] | None = None,
    ) -> None:
        """Check what can be checked without a tokenizer, and freeze it.

        Args:
            schema: a pydantic model, a dataclass or another type that pydantic knows, or a JSON schema. The text is
                JSON on one line, with `", "` and `": "` between its parts, properties in the order of the schema. An
                object of a type has no properties but the type's; in a JSON schema, say `additionalProperties: false`.
            regex: in Rust's syntax (much like Python's, without look-around and back-references), for the whole text.
            grammar: in llguidance's dialect of Lark; the text is what `start` matches.
            choices: texts, of which one is generated.

        Raises:
            ConstraintError: none or several were given, or one that says nothing: no choices, no valid JSON.
        """
        given = {"schema": schema, "regex": regex, "grammar": grammar, "choices": choices}
        kinds = [cast("Kind", name) for name, value in given.items() if value is not None]
        if len(kinds) != 1:
            raise ConstraintError(f"give one of schema=, regex=, grammar=, choices=; this has {kinds or 'none'}")
        object.__setattr__(self, "kind", kinds[0])
        object.__setattr__(self, "source", _SOURCES[kinds[0]](given[kinds[0]]))

    def __str__(self) -> str:
        shown = self.source if len(self.source) <= _SHOWN else f"{self.source[:_SHOWN]}…"
        return f"{self.kind} {shown}" if self.kind in ("schema", "choices") else f"{self.kind} {shown!r}"


def constraint_of(
    *,
    schema: type | Mapping[str, object] | None,
    regex: str | None,
    grammar: str | None,
    choices: Sequence[str] | None,
) -> Constraint | None:
    """The constraint, where one of the four is given; see `Constraint`."""
    if schema is None and regex is None and grammar is None and choices is None:
        return None
    return Constraint(schema=schema, regex=regex, grammar=grammar, choices=choices)


@runtime_checkable
class _PydanticModel(Protocol):
    def model_json_schema(self) -> dict[str, object]: ...


def _schema_source(schema: object) -> str:
    described = schema if isinstance(schema, Mapping) else _closed(_described(schema))
    try:
        return json.dumps(described, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConstraintError(f"the schema is no JSON: {error}") from None


def _described(schema: object) -> dict[str, object]:
    """The JSON schema of a type, as pydantic writes it."""
    from pydantic import TypeAdapter  # noqa: PLC0415 - `import dendrite` must not load it
    from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError  # noqa: PLC0415 - as above

    if isinstance(schema, str | bytes | int | float | list | tuple):
        raise ConstraintError(f"schema={schema!r} cannot be used: give a type, or a JSON schema as a dict")
    try:
        if isinstance(schema, _PydanticModel):
            return schema.model_json_schema()
        return TypeAdapter(cast("type[object]", schema)).json_schema()
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        raise ConstraintError(f"schema={schema!r} has no JSON schema: {error.message}") from None


def _closed(described: object) -> object:
    """The same JSON schema without properties that the type does not name, which JSON schema allows by default."""
    if isinstance(described, list):
        return [_closed(part) for part in described]
    if not isinstance(described, dict):
        return described
    closed = {name: _closed_part(name, part) for name, part in described.items()}
    return {"additionalProperties": False, **closed} if "properties" in closed else closed


def _closed_part(name: str, part: object) -> object:
    if name in ("const", "enum", "default", "examples"):  # values, not schemas
        return part
    if name in ("properties", "$defs") and isinstance(part, dict):  # its keys are the user's
        return {key: _closed(inner) for key, inner in part.items()}
    return _closed(part)


def _text_source(text: object) -> str:
    if not isinstance(text, str):
        raise ConstraintError(f"{text!r} cannot be used: give the expression or grammar as a string")
    return _encodable(text)


def _choices_source(choices: object) -> str:
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise ConstraintError(f"choices={choices!r} cannot be used: give a list of texts")
    if not choices:
        raise ConstraintError("choices is empty: there is nothing to choose from")
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise ConstraintError(f"choices[{index}]={choice!r} cannot be used: give texts, none of them empty")
        _encodable(choice)
    return json.dumps(list(dict.fromkeys(choices)), ensure_ascii=False)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConstraintError(f"{text!r} is no text that can be generated: {error.reason}") from None
    return text


_SOURCES = {"schema": _schema_source, "regex": _text_source, "grammar": _text_source, "choices": _choices_source}
