"""The tree that Monte Carlo searches keep: what was seen below each node, on plain numbers and without an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dendrite.dsl.strategies.base import Candidate
from dendrite.dsl.types import StepId


@dataclass(frozen=True, slots=True)
class Visited:
    """A node, and the values that were backed up through it."""

    node: Candidate
    children: tuple[StepId, ...] | None = None
    """None before it was expanded."""
    num_visits: int = 0
    total: float = 0.0
    """The sum of the values."""
    highest: float | None = None
    num_pending: int = 0
    """Leaves below it that are under way."""
    is_busy: bool = False
    """Itself under way."""
    is_closed: bool = False
    """Nothing below it is left to expand."""


Tree = Mapping[StepId, Visited]


def path_to(tree: Tree, node: StepId) -> list[StepId]:
    """From the node up to the root."""
    path: list[StepId] = []
    at: StepId | None = node
    while at is not None:
        path.append(at)
        at = tree[at].node.parent
    return path


def backed_up(tree: Tree, node: StepId, value: float) -> Tree:
    """The tree after one more visit of `node`, which was worth `value`."""
    changed = {
        at: replace(
            tree[at],
            num_visits=tree[at].num_visits + 1,
            total=tree[at].total + value,
            highest=max(value, -math.inf if (high := tree[at].highest) is None else high),
        )
        for at in path_to(tree, node)
    }
    return {**tree, **changed}


def pending(tree: Tree, leaf: StepId, change: int) -> Tree:
    """The tree with `leaf` under way (`change` of 1) or back (-1)."""
    changed = {at: replace(tree[at], num_pending=tree[at].num_pending + change) for at in path_to(tree, leaf)}
    changed[leaf] = replace(changed[leaf], is_busy=change > 0)
    return {**tree, **changed}


def expanded(tree: Tree, leaf: StepId, children: Sequence[Candidate], *, depth: int | None) -> Tree:
    """The tree with the children of `leaf`; what has nothing left to expand is closed, up to the root.

    Args:
        tree: before.
        leaf: what was expanded.
        children: as told; none of them makes it a dead end.
        depth: nodes this deep are expanded no more.
    """
    grown = dict(tree)
    for child in children:
        is_end = child.is_terminal or (depth is not None and child.depth >= depth)
        grown[child.id] = Visited(child, is_closed=is_end)
    grown[leaf] = replace(tree[leaf], children=tuple(child.id for child in children))
    for at in path_to(grown, leaf):
        below = grown[at].children
        if below is None or not all(grown[child].is_closed for child in below):
            break
        grown[at] = replace(grown[at], is_closed=True)
    return grown


def leaf_by(tree: Tree, root: StepId, urgency: Callable[[Visited, Visited], float]) -> StepId | None:
    """The leaf one comes to by always taking the child of highest urgency; None if none is left.

    A child below which everything is under way already is passed over for the next.

    Args:
        tree: what to descend.
        root: where to start.
        urgency: of a child, given (parent, child).
    """
    trail: list[Iterator[StepId]] = [iter((root,))]
    while trail:
        at = next(trail[-1], None)
        if at is None:
            trail.pop()
            continue
        seen = tree[at]
        if seen.is_closed or seen.is_busy:
            continue
        if seen.children is None:
            return at
        urgent = sorted(seen.children, key=lambda child: -urgency(seen, tree[child]))
        trail.append(iter(urgent))
    return None
