"""The life of a branch, as a table: what may happen to it in which state.

idle ── submit ──► queued ── admit ──► running ── finish ──► idle
                     ▲                    │
                     └───── preempt ──────┘          any ── prune ──► pruned
"""

from __future__ import annotations

from typing import Literal

from dendrite.engine.errors import BranchError

Status = Literal["idle", "queued", "running", "pruned"]
Transition = Literal["submit", "admit", "preempt", "finish", "prune"]

TRANSITIONS: dict[Status, dict[Transition, Status]] = {
    "idle": {"submit": "queued", "prune": "pruned"},
    "queued": {"admit": "running", "finish": "idle", "prune": "pruned"},
    "running": {"preempt": "queued", "finish": "idle", "prune": "pruned"},
    "pruned": {"prune": "pruned"},
}


def next_status(status: Status, transition: Transition) -> Status:
    """The state after `transition`.

    Raises:
        BranchError: the table does not allow it.
    """
    try:
        return TRANSITIONS[status][transition]
    except KeyError:
        raise BranchError(explain(status)) from None


def explain(status: Status) -> str:
    """What to tell a user whose call the branch's state forbids."""
    if status == "pruned":
        return "this branch was pruned: fork another one from its parent"
    return f"this branch is {status}: wait for its generation, or fork it and use the fork"
