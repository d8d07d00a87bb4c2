"""Prefixes that nobody holds: kept while their blocks are not needed, evicted least recently used first.

    held      root [s y s t e m . .] ── a [x y z]        prune(a), prune(root)
    cached    root [s y s t e m . .] ── a [x y z]        blocks count as free: whoever needs one gets it at once
    new root  "system. " + "uv"                          finds root again; a stays cached

A cached node keeps its place in the tree, its tokens and its K/V, but holds nobody: its parent may be held or cached,
its children are all cached. A node is cached after its children and held again before them, so the oldest entry never
has a child and goes first.
"""

from __future__ import annotations

from collections import OrderedDict

from dendrite.engine.blocks import BlockPool
from dendrite.engine.ids import BlockId, NodeId
from dendrite.engine.nodes import KVNode

MOST_HIDDEN_ROWS = 64
"""Cached nodes that keep their hidden rows: a row keeps the outputs of its whole step alive."""


class PrefixCache:
    """The cached nodes of one tree in the order of their last use, and what became of them."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._nodes: OrderedDict[NodeId, KVNode] = OrderedDict()
        self._with_hidden: OrderedDict[NodeId, KVNode] = OrderedDict()
        self.num_hits = 0
        self.num_hit_tokens = 0
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node: KVNode) -> bool:
        return node.node_id in self._nodes

    def add(self, node: KVNode) -> None:
        """Keeps a node that nobody holds; the caller gives up its own references to the blocks."""
        self._pool.keep(node.blocks)
        self._nodes[node.node_id] = node
        if node.hidden:
            self._with_hidden[node.node_id] = node
            if len(self._with_hidden) > MOST_HIDDEN_ROWS:
                _, oldest = self._with_hidden.popitem(last=False)
                oldest.hidden = {}

    def remove(self, node: KVNode) -> None:
        """Forgets the node; a block is free with it unless another node has it."""
        del self._nodes[node.node_id]
        self._with_hidden.pop(node.node_id, None)
        self._pool.drop(node.blocks)

    def oldest(self) -> KVNode:
        """The node to evict next; it has no children."""
        return next(iter(self._nodes.values()))

    def check_order(self) -> None:
        """Asserts that a cached node's children are cached and go before it."""
        place = {node_id: index for index, node_id in enumerate(self._nodes)}
        for node_id, node in self._nodes.items():
            for child in node.children:
                assert child in place, f"cached node {node_id} has the held child {child}"
                assert place[child] < place[node_id], f"cached node {node_id} goes before its child {child}"

    def count_hit(self, num_tokens: int) -> None:
        """A new root began on so many cached tokens."""
        self.num_hits += 1
        self.num_hit_tokens += num_tokens

    def num_blocks_of(self, node: KVNode | None) -> int:
        """Blocks that would not be free any more if the node were held."""
        blocks: set[BlockId] = set()
        while node is not None and node in self:
            blocks.update(block for block in node.blocks if self._pool.is_cached(block))
            node = node.parent
        return len(blocks)
