"""Select: who of some nodes goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dendrite.dsl.functions import Function
from dendrite.dsl.gathering import listed
from dendrite.dsl.node import Node, Step
from dendrite.dsl.operations import Select
from dendrite.dsl.run import Run


async def select(run: Run, operation: Select, steps: Sequence[Step]) -> list[Step]:
    """The survivors, best first: ordered by value, chosen by the function, cut to `keep`.

    Raises:
        CallbackError: the function returned something else than some of the nodes, each at most once.
    """
    ordered = ranked(steps)
    if operation.function is not None:
        nodes = [Node(step) for step in ordered]
        said = await operation.function.run(nodes, nodes)
        ordered = _survivors(run, operation.function, ordered, said)
    return ordered[: operation.keep]


def ranked(steps: Sequence[Step]) -> list[Step]:
    """Best first; equal ones in the order made."""
    return sorted(steps, key=lambda step: -math.inf if step.value is None else step.value, reverse=True)


def _survivors(run: Run, function: Function, candidates: Sequence[Step], said: object) -> list[Step]:
    nodes = listed(said)
    given = [Node(step) for step in candidates]
    known = set(given)
    if nodes is None or not all(isinstance(node, Node) and node in known for node in nodes):
        raise function.failed(f"returned {said!r}, not a list of nodes it was given", given)
    steps = [run.step_of(node) for node in nodes if isinstance(node, Node)]
    if len(set(map(id, steps))) < len(steps):
        raise function.failed("returned a node twice", given)
    return [step for step in steps if step is not None]
