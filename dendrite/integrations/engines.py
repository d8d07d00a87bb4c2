"""Engines by name, for adapters whose settings are strings: equal names and settings mean one engine in this process.

ChatDendrite(model="m") ──┐
ChatDendrite(model="m") ──┼── lease ──► one engine, loaded by the first, closed with the last lease
search_node(engine="m") ──┘
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from dendrite.engine.engine import Engine
from dendrite.engine.errors import RequestError


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What makes two requests for an engine the same; see `Engine.load`."""

    name: str
    dtype: str = "auto"
    device: str = "auto"
    kv_memory: int | str | None = None


class Lease:
    """A hold on a shared engine; ends with `close`, the end of a `with`, or when it is collected."""

    def __init__(self, engine: Engine, entry: _Entry | None) -> None:
        self.engine = engine
        self._close = weakref.finalize(self, _give_back, entry) if entry is not None else None

    def close(self) -> None:
        """Give the hold up; the last one of an engine that was loaded here closes it. Calling again is fine."""
        if self._close is not None:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@dataclass(eq=False, slots=True)
class _Entry:
    """One engine that was loaded by name, and how many hold it."""

    lock: threading.Lock = field(default_factory=threading.Lock)  # held while it loads, so that it loads once
    engine: Engine | None = None
    num_leases: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether there was an engine that runs no more."""
        engine = self.engine
        return engine is not None and engine.has_ended


class EngineShelf:
    """The engines of one process that go by a name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own: dict[str, Engine] = {}
        self._entries: dict[EngineSettings, _Entry] = {}

    def register(self, name: str, engine: Engine) -> None:
        """Give an engine of yours a name; it stays yours to close.

        Raises:
            RequestError: another engine has that name.
        """
        with self._lock:
            if self._own.setdefault(name, engine) is not engine:
                raise RequestError(f"another engine is registered as {name!r}: unregister it first, or take a new name")

    def unregister(self, name: str) -> None:
        """Forget a registered engine; nothing happens to the engine."""
        with self._lock:
            self._own.pop(name, None)

    def lease(self, settings: EngineSettings) -> Lease:
        """A hold on the engine of that name, which is loaded if it is nowhere yet, or died or was closed.

        Raises:
            ModelError, RequestError: as for `Engine.load`.
        """
        with self._lock:
            own = self._own.get(settings.name)
            if own is not None:
                return Lease(own, None)
            entry = self._entries.setdefault(settings, _Entry())
            if entry.has_ended:  # who holds it learns so from its calls; a new hold is on a new engine
                entry = self._entries[settings] = _Entry()
        with entry.lock:
            if entry.engine is None:
                entry.engine = Engine.load(
                    settings.name, dtype=settings.dtype, device=settings.device, kv_memory=settings.kv_memory
                )
            entry.num_leases += 1
            return Lease(entry.engine, entry)


def _give_back(entry: _Entry) -> None:
    with entry.lock:
        entry.num_leases -= 1
        if entry.num_leases or entry.engine is None:
            return
        engine, entry.engine = entry.engine, None
    engine.close()


ENGINES = EngineShelf()
"""The shelf of this process. A name must mean the same engine to everyone in it, so there is one."""
