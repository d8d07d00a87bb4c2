"""A forked child has a copy of an engine's tree, but none of its threads: it refuses every call and waits for none."""

from __future__ import annotations

import os
import weakref
from threading import RLock
from typing import Protocol

FORKED = (
    "this process was forked from the one that has the engine: load an engine here, and start such processes with "
    'multiprocessing.get_context("spawn"), since PyTorch does not survive a fork either'
)


class Forked(Protocol):
    """What has a thread of its own and a lock around all that a fork would copy."""

    @property
    def lock(self) -> RLock:
        """Guards what is copied."""

    def stay_behind(self) -> None:
        """This is the copy in the child."""


def refuse_after_fork(original: Forked) -> None:
    """Call `stay_behind` on the copy of each child.

    The lock is held while the process forks, so that the child finds it free and what it guards whole.
    """
    here = weakref.ref(original)
    forking: list[Forked] = []

    def before() -> None:
        if (found := here()) is not None:
            found.lock.acquire()
            forking.append(found)

    def after_in_parent() -> None:
        if forking:
            forking.pop().lock.release()

    def after_in_child() -> None:
        if forking:
            forking[0].stay_behind()
            forking.pop().lock.release()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=after_in_parent, after_in_child=after_in_child)
