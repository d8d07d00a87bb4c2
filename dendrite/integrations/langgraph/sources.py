"""Where a node gets its engine from, and what it knows of the run it is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from langgraph.runtime import Runtime, get_runtime

from dendrite.engine.engine import Engine
from dendrite.engine.errors import RequestError
from dendrite.integrations.engines import ENGINES, EngineSettings, Lease
from dendrite.integrations.langgraph.handles import seed_from

EngineSource = Engine | str | Callable[[Runtime[Any]], Engine]
"""An engine; the name of one, loaded with the first run; or a function that finds it in the run's Runtime.

An engine never travels in a graph's state."""


class NodeEngine:
    """Resolves an `EngineSource` for one node; an engine that it loaded stays as long as the node."""

    def __init__(self, source: EngineSource) -> None:
        if not isinstance(source, Engine | str) and not callable(source):
            raise RequestError(f"engine={source!r} is none: give an Engine, a name, or a function of the Runtime")
        self._source = source
        self._lease: Lease | None = None

    def get(self, runtime: Runtime[Any]) -> Engine:
        """The engine of this run.

        Raises:
            RequestError: the function found none.
            ModelError: no model has that name, or it cannot be loaded.
        """
        if isinstance(self._source, Engine):
            return self._source
        if isinstance(self._source, str):
            if self._lease is None or self._lease.engine.has_ended:
                self._lease = ENGINES.lease(EngineSettings(self._source))
            return self._lease.engine
        try:
            found = self._source(runtime)
        except (AttributeError, KeyError, TypeError) as error:
            raise RequestError(f"{_MISSING} (its engine function raised {type(error).__name__}: {error})") from error
        if not isinstance(found, Engine):
            raise RequestError(f"{_MISSING} (its engine function returned {found!r})")
        return found


_MISSING = "this node found no engine: pass context=... to the graph's call, or give the node an Engine or a name"


def current_runtime() -> Runtime[Any]:
    """The Runtime of the node that runs.

    Raises:
        RequestError: no graph runs here.
    """
    try:
        return get_runtime()
    except RuntimeError as error:
        raise RequestError("this is a node of a graph: add it with add_node, it does not run alone") from error


def run_path(runtime: Runtime[Any]) -> tuple[object, ...]:
    """What tells this execution of a node from others: the same in retries and when it resumes, new in a replay."""
    info = runtime.execution_info
    return ("run",) if info is None else ("run", info.thread_id, info.checkpoint_ns, info.task_id)


def run_seed(runtime: Runtime[Any]) -> int:
    """A seed for this execution of a node."""
    return seed_from(*run_path(runtime))
