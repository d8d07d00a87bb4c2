"""Users' states as JSON and back, by the type that the program's functions take."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, cast

from dendrite.engine.errors import ProgramError

if TYPE_CHECKING:  # compiling a program must not load pydantic
    from pydantic import TypeAdapter


class Codec:
    """Writes states of one type.

    Args:
        state: the type; `object` where the functions do not say, which leaves None, booleans, numbers, text, and lists
            and dicts of these.
    """

    def __init__(self, state: object) -> None:
        from pydantic import PydanticUserError, TypeAdapter  # noqa: PLC0415 - only for searches that are written down

        self._type = state
        self.name = getattr(state, "__qualname__", str(state))
        try:
            self._adapter: TypeAdapter[Any] = TypeAdapter(cast("Any", Any if state is object else state))
        except PydanticUserError as error:
            raise ProgramError(
                f"states of {self.name} cannot be written down: make it a dataclass ({error})"
            ) from error

    @property
    def schema(self) -> dict[str, str]:
        """The type's name, and a digest of its fields."""
        schema = json.dumps(self._adapter.json_schema(), sort_keys=True)
        return {"name": self.name, "digest": hashlib.sha256(schema.encode()).hexdigest()[:16]}

    def dump(self, state: object) -> Any:  # noqa: ANN401 - JSON
        """The state as plain values.

        Raises:
            ProgramError: it would not come back as it was.
        """
        try:
            plain = self._adapter.dump_python(state, mode="json")
            survives = self.load(plain) == state
        except ValueError:  # of pydantic: it knows no JSON for this
            survives = False
        if not survives:
            is_untyped = self._type is object
            hint = "annotate the functions' nodes, as in dd.Node[State]" if is_untyped else "make it a dataclass"
            raise ProgramError(f"the state {state!r} does not survive being written down as JSON: {hint}")
        return plain

    def load(self, plain: object) -> object:
        """The state again."""
        loaded: object = (
            self._adapter.validate_python(plain)
            if self._type is object
            else self._adapter.validate_json(json.dumps(plain))
        )
        return loaded
