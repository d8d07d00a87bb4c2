"""JSON schemas as grammars read them best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast
from urllib.parse import quote

_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords that hold schemas by name."""
_VALUES = frozenset({"enum", "const", "default", "example", "examples"})
"""Keywords that hold plain values, which may look like schemas."""
_FORMATS = frozenset(
    {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"},
)
"""What llguidance holds a string to. By the standard any other is a remark, such as pydantic's "path"."""


def closed(schema: Mapping[str, object], *, at: str = "#") -> dict[str, object]:
    """The schema with objects that have only the properties they name, unless it says otherwise.

    JSON schema leaves them open, and a small model would fill them with properties of its own.

    Args:
        schema: as a user or pydantic wrote it; it stays as it is.
        at: where the schema will stand, so that what it refers to is found there.
    """
    made = {key: _inside(key, value, at) for key, value in schema.items()}
    if "properties" in made:
        made.setdefault("additionalProperties", False)
    if made.get("format") not in _FORMATS:
        made.pop("format", None)
    if made.get("uniqueItems") is False:
        del made["uniqueItems"]
    reference = made.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        made["$ref"] = at + quote(reference[1:], safe="/~%$")
    return made


def _inside(key: str, value: object, at: str) -> object:
    if key in _VALUES:
        return value
    if key in _NAMED and isinstance(value, Mapping):
        return {name: _schema(item, at) for name, item in value.items()}
    if key == "allOf" and isinstance(value, list):
        return [_part(item, at) for item in value]
    if isinstance(value, list):
        return [_schema(item, at) for item in value]
    return _schema(value, at)


def _schema(value: object, at: str) -> object:
    return closed(cast("Mapping[str, object]", value), at=at) if isinstance(value, Mapping) else value


def _part(value: object, at: str) -> object:
    """One of several schemas that hold together: closed, it would forbid what the others name."""
    made = _schema(value, at)
    if isinstance(made, dict) and isinstance(value, Mapping) and "additionalProperties" not in value:
        made.pop("additionalProperties", None)
    return made
