"""The engines that one chat model has open: its own, and those that single calls named in its place."""

from __future__ import annotations

import threading
from typing import Self

from dendrite.integrations.engines import Lease
from dendrite.integrations.langchain.calls import Calls


class OpenedEngines:
    """Calls by the name of their engine, each with the lease it runs on.

    Copies of it, and what is read back from a pickle, begin with none open: a copy of a chat model takes leases of its
    own, so that closing one of the two does not close the other's engine.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while an engine is loaded, so that it loads once
        self._opened: dict[str, tuple[Lease, Calls]] = {}

    def get(self, name: str) -> Calls | None:
        """The calls on that engine, if it is open."""
        held = self._opened.get(name)
        return None if held is None else held[1]

    def add(self, name: str, lease: Lease) -> Calls:
        """Keeps the lease until `close`; the lock is held."""
        calls = Calls(lease.engine)
        self._opened[name] = (lease, calls)
        return calls

    def close(self) -> None:
        """Gives all leases back."""
        with self.lock:
            held = [lease for lease, _ in self._opened.values()]
            self._opened.clear()
        for lease in held:
            lease.close()

    def __copy__(self) -> Self:
        return type(self)()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()
