"""`response_format` in OpenAI's form as a constraint on the answer, and what the model is told about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from dendrite.engine.constraints import Constraint
from dendrite.engine.errors import RequestError
from dendrite.integrations.langchain.schemas import closed


@dataclass(frozen=True, slots=True)
class StructuredResponse:
    """What an answer is held to; nothing by default."""

    constraint: Constraint | None = None
    instruction: str = ""
    """A mask only constrains: the model writes better JSON when it is told the schema too."""


def structured_response(response_format: object) -> StructuredResponse:
    """What `response_format` asks for.

    Args:
        response_format: None, `{"type": "text"}`, `{"type": "json_object"}`, or
            `{"type": "json_schema", "json_schema": {"schema": {...}}}`.

    Raises:
        RequestError: none of these.
        ConstraintError: the schema is no JSON.
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else response_format
    if kind in (None, "text"):
        return StructuredResponse()
    if kind == "json_object":
        return StructuredResponse(Constraint(schema={"type": "object"}))
    if kind == "json_schema" and isinstance(response_format, Mapping):
        named = response_format.get("json_schema")
        schema = named.get("schema") if isinstance(named, Mapping) else None
        if isinstance(schema, Mapping):
            told = json.dumps(schema, ensure_ascii=False)
            return StructuredResponse(
                Constraint(schema=closed(schema)),
                f"Answer with JSON that matches this schema, and nothing else:\n{told}",
            )
    raise RequestError(
        f"response_format={response_format!r} cannot be used: give {{'type': 'json_object'}} or "
        "{'type': 'json_schema', 'json_schema': {'schema': ...}}"
    )
