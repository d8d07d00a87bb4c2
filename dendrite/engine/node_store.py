"""How long nodes live: held by tips and children, cached when nobody holds them, freed when their blocks are needed.

                attach                        detach, nobody left            a block is needed
    (new node) ────────► held ◄──── revive ──── cached ─────────────────────────► freed
                          └─────── detach, nothing computed ───────────────────────┘

Who owns what:
- a `KVNode` owns one reference on each of its blocks, as an owner while it is held and as a keeper while it is cached;
  a block has two of them only if a child went on in place.
- a `Tip` holds its node: as its writer (it may append), or attached at an offset (it reads what lies before).
- a held child node holds its parent, attached at the child's offset. A cached one holds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dendrite.engine.blocks import BlockPool
from dendrite.engine.cache import PrefixCache
from dendrite.engine.ids import BlockId, NodeId
from dendrite.engine.nodes import KVNode, Tip
from dendrite.engine.swap import Stored

K = TypeVar("K")


class NodeStore:
    """All nodes of one tree, held or cached; what the tree does with them goes through here."""

    def __init__(self, pool: BlockPool, drop_stored: Callable[[Stored], None]) -> None:
        self.pool = pool
        self._drop_stored = drop_stored
        self.nodes: dict[NodeId, KVNode] = {}
        self.cache = PrefixCache(pool)
        self._roots: dict[int, list[KVNode]] = {}  # first token -> root nodes
        self._next_id = 0

    def roots(self, first_token: int) -> list[KVNode]:
        """The root nodes that begin with the token, held and cached ones."""
        return self._roots.get(first_token, [])

    def new_root(self, first_token: int) -> KVNode:
        """A node without a parent, whose first token will be this one."""
        node = self.new_node(None, 0)
        self._roots.setdefault(first_token, []).append(node)
        return node

    def new_node(self, parent: KVNode | None, offset: int) -> KVNode:
        """An empty node at a place of the tree; the caller makes somebody hold it."""
        self._next_id += 1
        node = KVNode(NodeId(self._next_id), parent, offset)
        self.nodes[node.node_id] = node
        if parent is not None:
            parent.children[node.node_id] = node
        return node

    # --- holds -------------------------------------------------------------------------------------------------

    def attach(self, node: KVNode, offset: int) -> None:
        """Somebody holds the node up to `offset`."""
        node.attached[offset] = node.attached.get(offset, 0) + 1

    def detach(self, node: KVNode, offset: int) -> None:
        """One holder less; `collect` follows unless another one takes its place."""
        left = node.attached[offset] - 1
        if left:
            node.attached[offset] = left
        else:
            del node.attached[offset]

    def let_go(self, tip: Tip, node: KVNode, offset: int) -> None:
        """Ends a tip's hold."""
        if node.writer is tip:
            node.writer = None
        else:
            self.detach(node, offset)
        self._collect(node)

    def _collect(self, node: KVNode | None) -> None:
        """Caches the node if nothing holds it, then its parent, and so on; trims the first that stays held."""
        while node is not None:
            if node.writer is not None or node.attached:
                self._trim(node)
                return
            parent, offset = node.parent, node.offset
            self._retire(node)
            if parent is not None:
                self.detach(parent, offset)
            node = parent

    def _retire(self, node: KVNode) -> None:
        """Nobody holds the node: what is computed of it is cached, the rest is free."""
        if node.num_computed:
            self.cut(node, node.num_computed)
            self.cache.add(node)
            self.pool.release(node.blocks)
        else:
            self._evict_children(node, lambda _: True)
            self.pool.release(node.blocks)
            if node.stored is not None:
                self._drop_stored(node.stored)
            self._forget(node)

    def revive(self, node: KVNode) -> int:
        """Makes the path of a node that somebody attached to held again, if it was cached; tokens this saves."""
        revived: list[KVNode] = []
        above: KVNode | None = node
        while above is not None and above in self.cache:
            revived.append(above)
            above = above.parent
        for each in revived:
            for block in each.blocks:
                self.pool.share(block)
            self.cache.remove(each)
            if each.parent is not None:
                self.attach(each.parent, each.offset)
        for each in revived:
            self._trim(each)
        return node.start + live_length(node) - revived[-1].start if revived else 0

    # --- what lies beyond the last holder ----------------------------------------------------------------------

    def _trim(self, node: KVNode) -> None:
        """Lets go of what lies beyond the node's largest live offset; what is computed of it becomes a cached child."""
        live = live_length(node)
        if live < node.num_computed:
            self._split_off(node, live)
        self.cut(node, live)

    def _split_off(self, node: KVNode, live: int) -> None:
        """Moves the computed tokens beyond `live`, and the cached nodes attached to them, into a cached child.

        [s y s t e m . . q u e r y]        [s y s t e m . .] ── [q u e r y]
                        ^ live              held                cached
        """
        tail = self.new_node(node, live)
        tail.token_ids = node.token_ids[live : node.num_computed]
        tail.num_placed = tail.num_computed = len(tail.token_ids)
        first = tail.start // self.pool.block_size - node.start // self.pool.block_size
        tail.blocks = node.blocks[first : self._num_blocks(node, node.num_computed)]
        tail.hidden = {offset - live: row for offset, row in node.hidden.items() if live < offset <= node.num_computed}
        for child in [child for child in node.children.values() if child.offset > live]:
            del node.children[child.node_id]
            tail.children[child.node_id] = child
            child.parent, child.offset = tail, child.offset - live
        self.cache.add(tail)

    def cut(self, node: KVNode, live: int) -> None:
        """Drops the tokens beyond `live` and what is cached below them."""
        if live >= len(node.token_ids):
            return
        self._evict_children(node, lambda child: child.offset > live)
        del node.token_ids[live:]
        node.epoch += 1
        node.num_computed = min(node.num_computed, live)
        node.hidden = {offset: row for offset, row in node.hidden.items() if offset <= live}
        if node.stored is not None:
            node.stored.num_tokens = min(node.stored.num_tokens, live)
        if live < node.num_placed:
            node.num_placed = live
            keep = self._num_blocks(node, live)
            self.pool.release(node.blocks[keep:])
            del node.blocks[keep:]
            node.spans = None

    def _num_blocks(self, node: KVNode, num_tokens: int) -> int:
        """Blocks over which the node's first tokens spread."""
        size = self.pool.block_size
        return -(-(node.start + num_tokens) // size) - node.start // size if num_tokens else 0

    def unload(self, node: KVNode, stored: Stored | None) -> None:
        """Gives back a held node's blocks; its tokens stay, and its K/V is `stored`, if that is not None."""
        self._evict_children(node, lambda _: True)
        self.pool.release(node.blocks)
        node.blocks, node.spans, node.stored = [], None, stored
        node.num_placed = node.num_computed = 0
        node.epoch += 1

    def discard(self, block_id: BlockId) -> None:
        """Drops the K/V of every node that holds the block, and of all below them; the tokens stay."""
        doomed = [node for node in self.nodes.values() if block_id in node.blocks]
        for node in doomed:  # grows while it is walked: parents before children
            doomed.extend(child for child in node.children.values() if child not in doomed)
        for node in doomed:
            if node.is_live and node in self.cache:
                self._evict_children(node, lambda _: True)
                self._evict(node)
        for node in sorted(doomed, key=lambda node: node.start, reverse=True):
            if node.is_live:
                if node.stored is not None:
                    self._drop_stored(node.stored)
                node.hidden = {}
                self.unload(node, None)

    # --- eviction ----------------------------------------------------------------------------------------------

    def make_room(self, num: int) -> None:
        """Evicts until `num` blocks are free, which the caller knows to be possible.

        Gives up as many again where that lets them lie side by side.
        """
        while self.pool.num_free < num:
            self._evict(self.cache.oldest())
        enough = self.pool.num_free + num
        while num > 1 and len(self.cache) and self.pool.longest_free < num and self.pool.num_free < enough:
            self._evict(self.cache.oldest())

    def make_sole(self, node: KVNode, tail: BlockId) -> None:
        """Evicts what is cached behind the node in its last block, before the node writes there itself."""
        if self.pool.is_kept(tail):
            self._evict_children(node, lambda child: child.blocks[0] == tail)

    def clear_cache(self) -> None:
        """Evicts everything that nobody holds."""
        while len(self.cache):
            self._evict(self.cache.oldest())

    def _evict_children(self, node: KVNode, is_doomed: Callable[[KVNode], bool]) -> None:
        """Evicts those of the cached children, and all below them."""
        doomed = [child for child in node.children.values() if child in self.cache and is_doomed(child)]
        for child in doomed:  # grows while it is walked: parents before children
            doomed.extend(child.children.values())
        for child in reversed(doomed):
            self._evict(child)

    def _evict(self, node: KVNode) -> None:
        self.cache.num_evicted += 1
        self.cache.remove(node)
        self._forget(node)

    def _forget(self, node: KVNode) -> None:
        """Takes a node without children, holders and references out of the tree."""
        assert not node.children, f"node {node.node_id} is freed before its children"
        if node.parent is not None:
            del node.parent.children[node.node_id]
        else:
            siblings = self._roots[node.token_ids[0]]
            siblings.remove(node)
            if not siblings:
                del self._roots[node.token_ids[0]]
        node.blocks, node.hidden, node.is_live = [], {}, False
        node.epoch += 1
        del self.nodes[node.node_id]

    # --- integrity ---------------------------------------------------------------------------------------------

    def check_integrity(self, tips: set[Tip]) -> None:
        """Asserts that every count can be derived again from tips and nodes, and free + cached + used = total."""
        attached: dict[NodeId, dict[int, int]] = {node_id: {} for node_id in self.nodes}
        owners: dict[BlockId, int] = {}
        keepers: dict[BlockId, int] = {}
        for tip in tips:
            assert tip.node.is_live, f"a tip holds the freed node {tip.node.node_id}"
            if tip.node.writer is not tip:
                _count(attached[tip.node.node_id], tip.offset)
        for node in self.nodes.values():
            is_cached = node in self.cache
            if node.parent is not None:
                assert node.parent.children.get(node.node_id) is node, f"node {node.node_id} is no child of its parent"
                if not is_cached:
                    _count(attached[node.parent.node_id], node.offset)
            for block in node.blocks:
                _count(keepers if is_cached else owners, block)
        for node in self.nodes.values():
            self._check_node(node, attached[node.node_id])
        self.pool.check_integrity(owners, keepers)
        self.cache.check_order()

    def _check_node(self, node: KVNode, attached: dict[int, int]) -> None:
        name = f"node {node.node_id}"
        assert node.is_live, f"{name} was freed"
        assert node.attached == attached, f"{name}: attached {node.attached}, derived {attached}"
        assert node.num_computed <= node.num_placed <= len(node.token_ids), f"{name}: counts out of order"
        want = self._num_blocks(node, node.num_placed)
        assert len(node.blocks) == want, f"{name}: {len(node.blocks)} blocks, {want} needed"
        if node.parent is not None:
            assert node.start == node.parent.start + node.offset, f"{name} starts in the wrong place"
            assert not node.num_placed or node.parent.num_placed >= node.offset, f"{name} is placed before its parent"
        if node.stored is not None:
            assert not node.num_placed, f"{name} is in the pool and out of it"
            assert 0 < node.stored.num_tokens <= len(node.token_ids), f"{name}: wrong number of stored tokens"
        if node in self.cache:
            assert node.stored is None, f"{name} is cached and stored"
            assert not node.attached, f"{name} is cached and held"
            assert node.writer is None, f"{name} is cached and has a writer"
            assert 0 < node.num_computed == len(node.token_ids), f"{name} is cached and not computed"
            return
        assert node.attached or node.writer is not None, f"{name} is held by nobody"
        live = live_length(node)
        assert live == len(node.token_ids), f"{name}: {len(node.token_ids)} tokens, {live} reachable"


def live_length(node: KVNode) -> int:
    """How many of the node's tokens somebody holds."""
    live = max(node.attached, default=0)
    return live if node.writer is None else max(live, node.writer.offset)


def _count(counts: dict[K, int], key: K) -> None:
    counts[key] = counts.get(key, 0) + 1
