"""Bugs that somebody could make in the tree, each as a change to one method. A test must catch every one of them."""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest


@dataclass(frozen=True, slots=True)
class Mutation:
    """A change of source: `old` stands exactly once in the room."""

    name: str
    room: str
    old: str
    new: str

    def apply(self, patch: pytest.MonkeyPatch) -> None:
        """Puts the changed functions and methods in the place of the sound ones, until the patch is undone."""
        module = importlib.import_module(f"dendrite.engine.{self.room}")
        source = inspect.getsource(module)
        assert source.count(self.old) == 1, f"{self.name}: the code it changes is there {source.count(self.old)} times"
        changed = ModuleType(module.__name__)
        with pytest.MonkeyPatch.context() as meanwhile:
            meanwhile.setitem(sys.modules, module.__name__, changed)  # where dataclasses look for their own module
            mutant = compile(source.replace(self.old, self.new), str(module.__file__), "exec")
            exec(mutant, changed.__dict__)  # noqa: S102 - our own file
        for name, ours in vars(module).copy().items():
            theirs = vars(changed).get(name)
            if getattr(ours, "__module__", None) != module.__name__ or theirs is None:
                continue
            if inspect.isclass(ours):
                for method, function in vars(theirs).items():
                    if inspect.isfunction(function) and function.__code__ != getattr(ours, method).__code__:
                        patch.setattr(ours, method, function)  # unchanged ones stay: `super()` knows its own class
            elif inspect.isfunction(ours):
                patch.setattr(module, name, theirs)


MUTATIONS = (
    Mutation(
        "off by one at a block's edge",
        "tree",
        "num_new = -(-end // size) - (",
        "num_new = -(-(end - 1) // size) - (",
    ),
    Mutation(
        "copy-on-write is forgotten",
        "tree",
        "return self.pool.fill(tail) == fill and not writer_needs_it",
        "return True",
    ),
    Mutation(
        "a second writer in a shared block",
        "tree",
        "return self.pool.ref_count(tail) == 1 or self.pool.fill(tail) == fill",
        "return True",
    ),
    Mutation(
        "wrong position after a fork in the past",
        "tree",
        "return node, min(offset, length - node.start)",
        "return node, min(offset, length - node.start + 1)",
    ),
    Mutation(
        "stale slots after a block was copied",
        "tree",
        "        if copies:\n            node.spans = None\n        elif node.spans",
        "        if node.spans",
    ),
    Mutation(
        "stale slots after a node grew",
        "tree",
        "            self._join(node.spans, node.start",
        "            self._join([], node.start",
    ),
    Mutation(
        "stale slots after a node was cut",
        "node_store",
        "            del node.blocks[keep:]\n            node.spans = None\n",
        "            del node.blocks[keep:]\n",
    ),
    Mutation(
        "stale slots after K/V came back to other blocks",
        "node_store",
        "node.blocks, node.spans, node.stored = [], None, stored",
        "node.blocks, node.stored = [], stored",
    ),
    Mutation(
        "a cached tail is written over",
        "tree",
        "            self._store.make_sole(node, tail)",
        "            pass",
    ),
    Mutation(
        "a reference leaks",
        "node_store",
        "            self.pool.release(node.blocks)\n            if node.stored is not None:",
        "            if node.stored is not None:",
    ),
    Mutation(
        "a block is given back too early",
        "node_store",
        "            keep = self._num_blocks(node, live)\n",
        "            keep = self._num_blocks(node, live) - 1\n",
    ),
    Mutation(
        "tokens count as computed after they were cut",
        "node_store",
        "        node.num_computed = min(node.num_computed, live)\n",
        "",
    ),
    Mutation(
        "a tail takes the wrong blocks along",
        "node_store",
        "tail.blocks = node.blocks[first : ",
        "tail.blocks = node.blocks[first + 1 : ",
    ),
    Mutation("the newest is evicted first", "cache", "next(iter(self._nodes.values()))", "[*self._nodes.values()][-1]"),
    Mutation(
        "a parent leaves the pool before its children",
        "pressure",
        "            if not num_below.get(node.node_id)\n",
        "",
    ),
    Mutation(
        "K/V comes back one slot off",
        "pressure",
        "self._tree.slots(node, 0, num)",
        "self._tree.slots(node, 0, num)[::-1]",
    ),
    Mutation(
        "a copy is made before its source is computed",
        "step",
        "if budget <= 0 or self._copies_from_this_step(node):",
        "if budget <= 0:",
    ),
    Mutation(
        "a copy is made of a block that is not copied yet",
        "step",
        "parent.num_computed < node.offset or any(source == made for _, made in self._copies)",
        "parent.num_computed < node.offset",
    ),
    Mutation(
        "a row does not see its own key",
        "plan",
        "upto = int(place) + is_single",
        "upto = int(place)",
    ),
    Mutation(
        "a plan is lengthened after K/V left the pool and came back",
        "plan",
        " and run.node.epoch == epoch",
        "",
    ),
    Mutation(
        "a key that others read too is taken for a row's own",
        "plan",
        "if segment.row_end == segment.row_start + 1",
        "if segment.row_end > segment.row_start",
    ),
    Mutation(
        "a plan goes on in the block behind, wherever the next one is",
        "plan",
        "((first, slot + 1),) if slot == last else",
        "((first, last + 1),) if True else",
    ),
)
