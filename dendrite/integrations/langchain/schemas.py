"""JSON schemas as grammars read them best."""

from __future__ import annotations

from collections.abc import Mapping


def closed(schema: Mapping[str, object]) -> dict[str, object]:
    """The schema with objects that have only the properties they name, unless it says otherwise.

    JSON schema leaves them open, and a small model would fill them with properties of its own.
    """
    made = {key: _closed_value(value) for key, value in schema.items()}
    if "properties" in made:
        made.setdefault("additionalProperties", False)
    return made


def _closed_value(value: object) -> object:
    if isinstance(value, Mapping):
        return closed(value)
    if isinstance(value, list):
        return [_closed_value(item) for item in value]
    return value
