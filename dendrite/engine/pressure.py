"""Makes room in a pool that is too small: what idle branches hold leaves it, the least valuable leaves first.

    busy     root ── a ── a1        runs, or is about to
    idle          └─ b ── b1, b2    b1 goes first, then b2, then b; root and a stay

A node is worth what the best branch at it or below it is worth to the user. Where that is equal, or unknown, which
counts as more than any value, the least recently used goes first.

A node goes only when nothing below it is in the pool, and comes back only when everything above it is, so a path is
always in the pool from the root to somewhere. Its tokens stay, so nobody who holds it notices.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

from dendrite.engine.ids import BlockId, NodeId
from dendrite.engine.nodes import KVNode, Tip
from dendrite.engine.swap import SwapSpace
from dendrite.engine.tree import KVTree


class Pressure:
    """Moves K/V out of the pool and back in, over one tree and one swap space."""

    def __init__(self, tree: KVTree, swap: SwapSpace) -> None:
        self._tree = tree
        self._swap = swap

    def num_movable(self, busy: Iterable[Tip]) -> int:
        """Blocks that would be available besides if all that is not on the path of a `busy` tip left the pool."""
        held: set[BlockId] = set()
        for node in _nodes_above(busy).values():
            held.update(node.blocks)
        return self._tree.pool.num_used - len(held)

    def make_room(self, num: int, busy: Iterable[Tip]) -> bool:
        """Moves idle nodes out until `num` blocks are available; whether that came to pass."""
        pool = self._tree.pool
        if pool.num_available >= num:
            return True
        kept = _nodes_above(busy)
        num_below = self._placed_children()
        worth = self._worth()
        leaves = [
            (worth[node.node_id], node.last_used, node.node_id)
            for node in self._tree.nodes.values()
            if node.num_placed and node.node_id not in kept and node not in self._tree.cache
            if not num_below.get(node.node_id)
        ]
        heapq.heapify(leaves)
        while leaves and pool.num_available < num:
            _, last_used, node_id = heapq.heappop(leaves)
            node = self._tree.nodes[node_id]
            self.move_out(node)
            parent = node.parent
            if parent is None:
                continue
            parent.last_used = max(parent.last_used, last_used)
            num_below[parent.node_id] -= 1
            if not num_below[parent.node_id] and parent.node_id not in kept:
                heapq.heappush(leaves, (worth[parent.node_id], parent.last_used, parent.node_id))
        return pool.num_available >= num

    def move_out(self, node: KVNode) -> None:
        """Takes a node's K/V out of the pool; nothing held below it is there."""
        stored = None
        if node.num_computed:
            stored = self._swap.put(self._tree.spans(node, 0, node.num_computed), node.num_computed)
        self._tree.unload(node, stored)

    def move_in(self, node: KVNode) -> None:
        """Puts a node's K/V back, if it is not lost; everything above it is in the pool.

        Raises:
            OutOfBlocks: nothing was changed.
        """
        stored = node.stored
        assert stored is not None, "the node is in the pool"
        if not stored.is_lost:
            num = stored.num_tokens
            copies = self._tree.place(node, num)
            try:
                self._swap.mover.copy_blocks(copies)
                if self._swap.take(stored, self._tree.slots(node, 0, num)):
                    node.num_computed = num
            except BaseException:  # nobody knows what those blocks hold now: it is computed again
                self._swap.drop(stored)
                self._tree.unload(node, None)
                raise
        node.stored = None

    def _worth(self) -> dict[NodeId, float]:
        """What each node is worth: the greatest value of a branch that ends at it or below it."""
        worth = dict.fromkeys(self._tree.nodes, -math.inf)
        for tip in self._tree.tips:
            value = math.inf if tip.value is None else tip.value
            worth[tip.node.node_id] = max(worth[tip.node.node_id], value)
        for node in sorted(self._tree.nodes.values(), key=lambda node: node.start, reverse=True):  # children first
            if node.parent is not None:
                above = node.parent.node_id
                worth[above] = max(worth[above], worth[node.node_id])
        return worth

    def _placed_children(self) -> dict[NodeId, int]:
        """How many held children of each node are in the pool."""
        counts: dict[NodeId, int] = {}
        for node in self._tree.nodes.values():
            if node.parent is not None and node.num_placed and node not in self._tree.cache:
                counts[node.parent.node_id] = counts.get(node.parent.node_id, 0) + 1
        return counts


def _nodes_above(tips: Iterable[Tip]) -> dict[NodeId, KVNode]:
    """Every node on the tips' paths."""
    found: dict[NodeId, KVNode] = {}
    for tip in tips:
        node: KVNode | None = tip.node
        while node is not None and node.node_id not in found:
            found[node.node_id] = node
            node = node.parent
    return found
