"""A plan that is made by lengthening the last one is the one that would have been made."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dendrite.engine import plan as room
from dendrite.engine.batch import Plan
from dendrite.engine.blocks import BlockPool
from dendrite.engine.ids import NodeId
from dendrite.engine.nodes import Tip
from dendrite.engine.plan import Planner, Run, plan_runs
from dendrite.engine.tree import KVTree

make_plan = plan_runs


class Steps:
    """Steps of a tree with blocks of four, as the scheduler takes them, each plan compared."""

    def __init__(self) -> None:
        self.tree = KVTree(BlockPool(40, 4))
        self.planner = Planner(self.tree)

    def run(self, *tips: Tip) -> None:
        found: dict[NodeId, Run] = {}
        for tip in tips:
            for node, upto in self.tree.pending(tip):
                if node.node_id not in found:
                    found[node.node_id] = Run(node, node.num_computed, upto)
                    self.tree.place(node, upto)
        runs = list(found.values())
        assert self.planner.plan(runs) == make_plan(self.tree, runs)
        for run in runs:
            run.node.num_computed = run.end

    def grow(self, *tips: Tip) -> None:
        for token, tip in enumerate(tips):
            self.tree.extend(tip, [token])
        self.run(*tips)


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many runs each plan had that was made from nothing."""
    counts: list[int] = []

    def counted(tree: KVTree, runs: Sequence[Run]) -> tuple[list[Run], Plan]:
        counts.append(len(runs))
        return make_plan(tree, runs)

    monkeypatch.setattr(room, "plan_runs", counted)
    return counts


def test_paths_that_grow_are_lengthened(steps: Steps, made: list[int]) -> None:
    """Across blocks, beside each other and below a shared trunk, until another one comes or one ends."""
    root, _ = steps.tree.new_root([1, 2, 3, 4, 5, 6])
    steps.run(root)
    a, b, c = (steps.tree.fork(root) for _ in range(3))
    for _ in range(10):
        steps.grow(a, b)
    assert made == [1, 2]
    for _ in range(3):
        steps.grow(a, b, c)
    for _ in range(3):
        steps.grow(c, a)
    assert made == [1, 2, 3, 2]
    steps.tree.extend(a, [7, 7])
    steps.grow(c, a)
    assert made == [1, 2, 3, 2, 2], "three tokens are more than one"


def test_keys_that_came_back_elsewhere_are_not_taken_for_those_of_before() -> None:
    """K/V that left the pool between two steps has other slots than it had."""
    steps = Steps()
    root, _ = steps.tree.new_root([1, 2, 3])
    for _ in range(3):
        steps.grow(root)
    node = root.node
    length = node.num_computed
    steps.tree._store.unload(node, None)
    other, _ = steps.tree.new_root([5, 5])
    steps.tree.place(other.node, 2)
    steps.tree.place(node, length)
    node.num_computed = length
    steps.grow(root)


def test_a_key_that_others_read_is_nobodys_own() -> None:
    """A branch and its fork in one step: the fork's row reads the branch's newest key, and not the next one."""
    steps = Steps()
    root, _ = steps.tree.new_root([1, 2, 3])
    steps.run(root)
    steps.tree.extend(root, [4])
    fork = steps.tree.fork(root)
    steps.tree.extend(fork, [5])
    steps.run(root, fork)
    for _ in range(3):
        steps.grow(root, fork)
