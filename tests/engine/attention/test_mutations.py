"""Seeded bugs in the attention of the CPU: the suite that every back end passes must fail with each of them."""

from __future__ import annotations

import random

import pytest

from dendrite.engine.attention.cpu import TreeAttention
from dendrite.engine.attention.ordered import OrderedAttention
from tests.engine.attention import conformance, test_conformance
from tests.engine.mutations import Mutation

MUTATIONS = (
    Mutation(
        "causal mask off by one",
        "attention.tiles",
        "tuple(min(before + index + 1, num_keys)",
        "tuple(min(before + index + 2, num_keys)",
    ),
    Mutation(
        "a chunk has no mask", "attention.cpu", "    if not run.limits:\n", "    if run.limits or not run.limits:\n"
    ),
    Mutation(
        "a gathered run has no end",
        "attention.cpu",
        "end = min(last, first + num_keys)",
        "end = last",
    ),
    Mutation(
        "keys that begin in a block are misplaced",
        "attention.cpu",
        "start = len(blocks) * block_size + first % block_size",
        "start = len(blocks) * block_size",
    ),
    Mutation(
        "stale plan",
        "attention.cpu",
        "self.tiles = [_tile_views(",
        "self.tiles = self.tiles or [_tile_views(",
    ),
    Mutation(
        "two runs share a column",
        "attention.tiles",
        "[column + run.num_keys] *",
        "[column + run.num_keys - 1] *",
    ),
    Mutation(
        "a row reads the key behind its end",
        "attention.ordered",
        "hidden = torch.arange(first, width) >= torch",
        "hidden = torch.arange(first, width) > torch",
    ),
    Mutation(
        "a row does not read its own key",
        "attention.ordered_tiles",
        "segment.causal_rows - 1 - (row",
        "segment.causal_rows - (row",
    ),
    Mutation(
        "slots that came along with a block stay",
        "attention.ordered",
        "        if self._wrong is not None:\n            found.index_copy_",
        "        if self._wrong is None:\n            found.index_copy_",
    ),
    Mutation(
        "values of a group are left out",
        "attention.ordered",
        "for low in range(0, self.width, GROUP)",
        "for low in range(0, self.width - GROUP, GROUP)",
    ),
)


def everything() -> None:
    """Both back ends on every shape, in contiguous and scattered blocks, and one plan after another."""
    for backend in (TreeAttention, OrderedAttention):
        for name, tree in test_conformance.SHAPES.items():
            for is_scattered in (False, True):
                case = conformance.make_case(tree, random.Random(name), block_size=8, is_scattered=is_scattered)
                conformance.assert_conforms(backend, case, test_conformance.EXACT)
        test_conformance.test_plans_replace_each_other(backend)


def test_without_a_bug_everything_passes() -> None:
    """What is run against the bugs is sound."""
    everything()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_seeded_bug_is_caught(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change makes the suite fail."""
    mutation.apply(monkeypatch)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        everything()
