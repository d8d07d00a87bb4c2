"""Handles on their way into checkpoints and out again: whole for who reads the state, short where they are kept.

    state        "dendrite:1:model:8f…:eJw…:…"         model, randomness, tokens: good anywhere
    checkpoint   "dendrite:ref:1:model:8f…:ab12…"      model, randomness, the digest of tokens in the saver's table

Strings are found in lists, tuples, dicts and `Send`s, at any depth. A handle inside another object stays whole; it is
good, but its checkpoint holds no K/V for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from langgraph.types import Send

from dendrite.engine.errors import BranchError
from dendrite.integrations.langgraph.handles import (
    HANDLE_PREFIX,
    Reference,
    Snapshot,
    is_reference,
    packed_digest,
    packed_tokens,
)
from dendrite.integrations.langgraph.leases import Leases
from dendrite.integrations.langgraph.token_table import Place, TokenKey, TokenTable


class StoredHandles:
    """Takes handles apart for one saver, puts them together again, and holds their K/V meanwhile."""

    def __init__(self, table: TokenTable, leases: Leases) -> None:
        self._table = table
        self._leases = leases

    def shortened(self, place: Place, values: Any) -> Any:  # noqa: ANN401 - whatever a state holds
        """The values with short handles, whose tokens the checkpoint at `place` holds from now on."""
        found = _handles_in(values)
        if not found:
            return values
        paths = {text: TokenKey(snapshot.model, snapshot.digest) for text, snapshot in found.items()}
        self._table.hold(place, {paths[text]: packed_tokens(text) for text in found})
        self._leases.hold((paths[text], snapshot) for text, snapshot in found.items())
        short = {text: str(Reference(*paths[text], snapshot.draw)) for text, snapshot in found.items()}
        return _map_strings(values, lambda text: short.get(text, text))

    def whole(self, values: Any) -> Any:  # noqa: ANN401 - as `shortened`
        """The way back. A handle whose tokens are gone, or are not those it names, stays short; opening it says so."""
        found: dict[str, Reference] = {}

        def collect(text: str) -> str:
            if is_reference(text):
                found[text] = Reference.read(text)
            return text

        _map_strings(values, collect)
        if not found:
            return values
        keys = {text: TokenKey(reference.model, reference.digest) for text, reference in found.items()}
        stored = self._table.read(set(keys.values()))
        tokens = {key: data for key, data in stored.items() if packed_digest(data) == key.digest}
        self._leases.touch(tokens.keys())
        long = {text: found[text].handle(tokens[key]) for text, key in keys.items() if key in tokens}
        return _map_strings(values, lambda text: long.get(text, text))

    def keep_kv(self, values: Any) -> int:  # noqa: ANN401 - as `shortened`
        """Writes down the K/V of all that the values name; see `Leases.keep_kv`."""
        return self._leases.keep_kv(_handles_in(values).values())

    def copy_thread(self, source: str, target: str) -> None:
        """Both threads' checkpoints hold the same."""
        self._table.copy_thread(source, target)

    def release(self, places: Collection[Place]) -> None:
        """These checkpoints hold nothing any more."""
        if places:
            self._leases.release(self._table.release(places))

    def release_thread(self, thread_id: str) -> None:
        """Nor does any of this thread."""
        self._leases.release(self._table.release_thread(thread_id))


def _handles_in(values: Any) -> dict[str, Snapshot]:  # noqa: ANN401 - whatever a state holds
    """Each whole handle, and what it says."""
    found: dict[str, Snapshot] = {}

    def collect(text: str) -> str:
        if text.startswith(HANDLE_PREFIX) and text not in found:
            with suppress(BranchError):  # a text that only begins like one
                found[text] = Snapshot.read(text)
        return text

    _map_strings(values, collect)
    return found


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:  # noqa: ANN401 - a channel's value may be anything
    """The value with each string changed; itself, or the very parts of it, where nothing did."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Send):
        return _map_send(value, change)
    if type(value) is dict:
        changed = {key: _map_strings(item, change) for key, item in value.items()}
        return value if all(changed[key] is item for key, item in value.items()) else changed
    if type(value) is list or isinstance(value, tuple):
        items = [_map_strings(item, change) for item in value]
        if all(item is old for item, old in zip(items, value, strict=True)):
            return value
        return items if isinstance(value, list) else _same_kind(value, items)
    return value


def _map_send(value: Send, change: Callable[[str], str]) -> Send:
    arg = _map_strings(value.arg, change)
    if arg is value.arg:
        return value
    changed = copy.copy(value)
    changed.arg = arg
    return changed


def _same_kind(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    """A tuple of the items; a named one of the same name."""
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
