"""Lists in a graph's state that nodes work on, and the branches of their handles, opened for as long as it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine
from dendrite.engine.errors import RequestError
from dendrite.integrations.langgraph.handles import open_all
from dendrite.integrations.langgraph.sources import NodeEngine, current_runtime

State = Mapping[str, Any]
Update = dict[str, object]


@contextmanager
def opened_branches(
    source: NodeEngine, state: State, key: str, *, path: Sequence[object] = ()
) -> Iterator[tuple[Engine, list[Branch]]]:
    """The branches of the state's handles, pruned at the end; with a `path` they draw by it, each in its own way."""
    engine = source.get(current_runtime())
    opened = open_all(engine, listed(state, key), path=path)
    try:
        yield engine, opened
    finally:
        for branch in opened:
            branch.prune()


def listed(state: State, key: str) -> list[Any]:
    """The list under a key of the state.

    Raises:
        RequestError: there is none, or it is empty.
    """
    found = state.get(key)
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise RequestError(f"the state has no list under {key!r}: it has {found!r}")
    return list(found)
