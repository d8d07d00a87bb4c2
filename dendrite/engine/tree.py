"""The KV tree: append-only runs of tokens that own blocks; children attached at (node, offset). No tensor is touched.

    root  [s y s t e m . . p r o m p t]          a `KVNode`: 13 tokens, blocks 1 2 3 4 (block size 4)
           └── attached at 13 ──┬── a [x y z]    wrote first: goes on in block 4, slot 1, and shares it
                                └── b [u v]      wrote second: block 4 is copied to block 9, slot 0 only

`fork` adds a holder at (node, offset) and nothing else. Who writes takes blocks: the first writer at a block's fill
point goes on in place, any other copies that one block. What nobody can reach any more is released at once: beyond
the largest live offset of a node, and the whole node when nothing is attached to it.

Who owns what:
- a `KVNode` owns one reference on each of its blocks; a block has two owners only if a child went on in place.
- a `Tip` holds its node: as its writer (it may append), or attached at an offset (it reads what lies before).
- a child node holds its parent: attached at the child's offset.
Ownership moves in two places: `extend` turns a tip's hold into its new node's hold, `_collect` gives everything back.
"""

from __future__ import annotations

from collections.abc import Sequence

from dendrite.engine.blocks import BlockPool
from dendrite.engine.errors import OutOfBlocks
from dendrite.engine.ids import BlockId, NodeId
from dendrite.engine.nodes import KVNode, Tip
from dendrite.engine.prefixes import longest_match


class KVTree:
    """All nodes of one engine over one block pool. Not thread-safe: the engine's lock guards it."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.tips: set[Tip] = set()
        self.nodes: dict[NodeId, KVNode] = {}
        self.num_copies = 0
        self._roots: dict[int, list[KVNode]] = {}  # first token -> root nodes
        self._next_id = 0

    # --- the mutations users see -------------------------------------------------------------------------------

    def new_root(self, token_ids: Sequence[int]) -> tuple[Tip, int]:
        """A tip after `token_ids`, sharing the longest live prefix of a block or more; and how much was shared."""
        node, offset = longest_match(self._roots.get(token_ids[0], []), token_ids, at_least=self.pool.block_size)
        if node is None:
            tip = self._new_node(None, 0)
            self._roots.setdefault(token_ids[0], []).append(tip.node)
            shared = 0
        else:
            tip = self._attach_tip(node, offset)
            shared = tip.length
        if shared < len(token_ids):
            self.extend(tip, token_ids[shared:])
        return tip, shared

    def fork(self, tip: Tip, *, at: int | None = None) -> Tip:
        """Another tip at the same place, or after the first `at` tokens of the path: O(1), or a walk up to `at`."""
        if tip.num_ahead:
            at = min(at or tip.num_known, tip.num_known)
        if at is None:
            return self._attach_tip(tip.node, tip.offset)
        return self._attach_tip(*self._locate(tip, at))

    def extend(self, tip: Tip, token_ids: Sequence[int]) -> None:
        """Appends tokens; K/V comes later. A tip that may not write its node gets a child node of its own."""
        node = tip.node
        at_end = tip.offset == len(node.token_ids)
        if not (at_end and node.writer is tip):
            if at_end and node.writer is None:
                node.writer = tip
                self._detach(node, tip.offset)
            else:
                node = self._branch_off(tip)
        node.token_ids.extend(token_ids)
        tip.offset = len(node.token_ids)

    def truncate(self, tip: Tip, length: int) -> None:
        """Rolls the tip back to its first `length` tokens (at least one)."""
        if length == tip.length:
            return
        tip.num_ahead = 0
        node, offset = self._locate(tip, length)
        if node.writer is tip:
            tip.offset = offset
            self._trim(node)
            return
        old_node, old_offset = tip.node, tip.offset
        self._attach(node, offset)
        tip.node, tip.offset = node, offset
        self._let_go(tip, old_node, old_offset)

    def look_ahead(self, tip: Tip, draw: int) -> None:
        """Appends the token that is being drawn: draw number `draw` of the step in flight.

        Its K/V can be placed and computed before it is known: the runner takes negative ids `-1 - draw` from what the
        step before it drew. `settle` or `drop_ahead` follows before the step after.
        """
        self.extend(tip, [-1 - draw])
        tip.num_ahead = 1

    def settle(self, tip: Tip, token_id: int) -> None:
        """The token that was looked ahead is `token_id`."""
        tip.node.token_ids[tip.offset - 1] = token_id
        tip.num_ahead = 0

    def drop_ahead(self, tip: Tip) -> None:
        """The token that was looked ahead does not count, if there is one. Its slot may be written; nobody reads it."""
        self.truncate(tip, tip.num_known)

    def prune(self, tip: Tip) -> None:
        """Lets the tip go; what nobody else reaches is free when this returns."""
        self.tips.remove(tip)
        self._let_go(tip, tip.node, tip.offset)

    # --- reading -----------------------------------------------------------------------------------------------

    def token_ids(self, tip: Tip, *, start: int = 0) -> list[int]:
        """The path's known tokens from absolute position `start` on."""
        pieces: list[list[int]] = []
        node: KVNode | None = tip.node
        offset = tip.offset - tip.num_ahead
        while node is not None and node.start + offset > start:
            pieces.append(node.token_ids[max(0, start - node.start) : offset])
            offset, node = node.offset, node.parent
        return [token for piece in reversed(pieces) for token in piece]

    def pending(self, tip: Tip) -> list[tuple[KVNode, int]]:
        """The nodes of the path that lack K/V, root first, each with the offset up to which it is needed."""
        found: list[tuple[KVNode, int]] = []
        node: KVNode | None = tip.node
        offset = tip.offset
        while node is not None and node.num_computed < offset:
            found.append((node, offset))
            offset, node = node.offset, node.parent
        found.reverse()
        return found

    def num_computed(self, tip: Tip) -> int:
        """How many tokens from the root on have their K/V."""
        pending = self.pending(tip)
        return pending[0][0].start + pending[0][0].num_computed if pending else tip.length

    def spans(self, node: KVNode, first: int, last: int) -> list[tuple[int, int]]:
        """The slots of the node's tokens `[first, last)`: ranges in order, blocks that lie side by side joined."""
        if node.spans is None:
            node.spans = self._joined_blocks(node)
        low, high = node.start + first, node.start + last
        return [
            (slot + max(low, begin) - begin, slot + min(high, end) - begin)
            for begin, end, slot in node.spans
            if begin < high and end > low
        ]

    def slots(self, node: KVNode, first: int, last: int) -> list[int]:
        """The slot of each of the node's tokens `[first, last)`."""
        return [slot for begin, end in self.spans(node, first, last) for slot in range(begin, end)]

    # --- blocks ------------------------------------------------------------------------------------------------

    def place(self, node: KVNode, last: int) -> list[tuple[BlockId, BlockId]]:
        """Gives slots to the node's tokens up to offset `last`; the parent's are placed already.

        Returns the copy-on-write this needs, `(source, destination)`: none, or one block.

        Raises:
            OutOfBlocks: the pool is too small; nothing was changed.
        """
        if last <= node.num_placed:
            return []
        size = self.pool.block_size
        begin, end = node.start + node.num_placed, node.start + last
        tail = self._tail_block(node, begin)
        in_place = tail is None or self._may_continue(node, tail, begin % size)
        num_new = -(-end // size) - (-(-begin // size) if in_place else begin // size)
        if num_new > self.pool.num_free:
            raise OutOfBlocks(num_new, self.pool.num_free, 0)
        behind = node.blocks[-1] if node.blocks else (tail if in_place else None)
        taken = self.pool.allocate(num_new, after=behind)
        copies = self._settle_tail(node, tail, taken, in_place=in_place)
        node.blocks.extend(taken)
        for block in node.blocks[-num_new - 1 :]:
            self.pool.set_fill(block, size)
        self.pool.set_fill(node.blocks[-1], (end - 1) % size + 1)
        node.num_placed = last
        node.spans = None if taken or copies or node.spans is None else node.spans
        return copies

    def needs_copy(self, node: KVNode) -> bool:
        """Whether placing the node's next token copies a block."""
        position = node.start + node.num_placed
        tail = self._tail_block(node, position)
        return tail is not None and not self._may_continue(node, tail, position % self.pool.block_size)

    def check_integrity(self) -> None:
        """Asserts that every count can be derived again from tips and nodes, and free + used = total."""
        attached: dict[NodeId, dict[int, int]] = {node_id: {} for node_id in self.nodes}
        owners: dict[BlockId, int] = {}
        for tip in self.tips:
            assert tip.node.is_live, f"a tip holds the freed node {tip.node.node_id}"
            if tip.node.writer is not tip:
                _count(attached[tip.node.node_id], tip.offset)
        for node in self.nodes.values():
            if node.parent is not None:
                assert node.parent.children.get(node.node_id) is node, f"node {node.node_id} is no child of its parent"
                _count(attached[node.parent.node_id], node.offset)
            for block in node.blocks:
                owners[block] = owners.get(block, 0) + 1
        for node in self.nodes.values():
            self._check_node(node, attached[node.node_id])
        self.pool.check_integrity(owners)

    # --- holds -------------------------------------------------------------------------------------------------

    def _new_node(self, parent: KVNode | None, offset: int) -> Tip:
        self._next_id += 1
        node = KVNode(NodeId(self._next_id), parent, offset)
        self.nodes[node.node_id] = node
        tip = node.writer = Tip(node, 0)
        self.tips.add(tip)
        return tip

    def _branch_off(self, tip: Tip) -> KVNode:
        """A child node for a tip that may not write where it stands; the tip's hold becomes the child's."""
        parent = tip.node
        self._next_id += 1
        node = KVNode(NodeId(self._next_id), parent, tip.offset)
        self.nodes[node.node_id] = parent.children[node.node_id] = node
        if parent.writer is tip:
            parent.writer = None
            self._attach(parent, tip.offset)
        node.writer = tip
        tip.node, tip.offset = node, 0
        return node

    def _attach_tip(self, node: KVNode, offset: int) -> Tip:
        node.attached[offset] = node.attached.get(offset, 0) + 1
        tip = Tip(node, offset)
        self.tips.add(tip)
        return tip

    def _attach(self, node: KVNode, offset: int) -> None:
        node.attached[offset] = node.attached.get(offset, 0) + 1

    def _detach(self, node: KVNode, offset: int) -> None:
        left = node.attached[offset] - 1
        if left:
            node.attached[offset] = left
        else:
            del node.attached[offset]

    def _let_go(self, tip: Tip, node: KVNode, offset: int) -> None:
        if node.writer is tip:
            node.writer = None
        else:
            self._detach(node, offset)
        self._collect(node)

    def _collect(self, node: KVNode | None) -> None:
        """Frees the node if nothing holds it, then its parent, and so on; trims the first that stays."""
        while node is not None:
            if node.writer is not None or node.attached:
                self._trim(node)
                return
            parent = node.parent
            self._free(node)
            if parent is not None:
                del parent.children[node.node_id]
                self._detach(parent, node.offset)
            node = parent

    def _free(self, node: KVNode) -> None:
        self.pool.release(node.blocks)
        if node.parent is None:
            siblings = self._roots[node.token_ids[0]]
            siblings.remove(node)
            if not siblings:
                del self._roots[node.token_ids[0]]
        node.blocks, node.hidden, node.is_live = [], None, False
        node.epoch += 1
        del self.nodes[node.node_id]

    def _trim(self, node: KVNode) -> None:
        """Releases what lies beyond the node's largest live offset."""
        live = max(node.attached, default=0)
        if node.writer is not None:
            live = max(live, node.writer.offset)
        if live >= len(node.token_ids):
            return
        del node.token_ids[live:]
        node.epoch += 1
        node.num_computed = min(node.num_computed, live)
        if node.hidden is not None and node.hidden[0] > live:
            node.hidden = None
        if live < node.num_placed:
            node.num_placed = live
            size = self.pool.block_size
            keep = -(-(node.start + live) // size) - node.start // size if live else 0
            self.pool.release(node.blocks[keep:])
            del node.blocks[keep:]
            node.spans = None

    # --- finding -----------------------------------------------------------------------------------------------

    def _locate(self, tip: Tip, length: int) -> tuple[KVNode, int]:
        """The node and offset after the path's first `length` tokens; never offset 0 below a parent."""
        node, offset = tip.node, tip.offset
        while length <= node.start:
            assert node.parent is not None, "length is at least 1"
            offset, node = node.offset, node.parent
        return node, min(offset, length - node.start)

    # --- block arithmetic --------------------------------------------------------------------------------------

    def _tail_block(self, node: KVNode, position: int) -> BlockId | None:
        """The block that holds the token before `position` if the next one falls into the same block."""
        size = self.pool.block_size
        if position % size == 0:
            return None
        owner = node if node.blocks else node.parent
        assert owner is not None
        return owner.blocks[position // size - owner.start // size]

    def _may_continue(self, node: KVNode, tail: BlockId, fill: int) -> bool:
        """Whether the node may write slot `fill` of `tail`: it is next, or nobody else has the block."""
        if node.blocks:
            return self.pool.ref_count(tail) == 1 or self.pool.fill(tail) == fill
        parent = node.parent
        assert parent is not None
        writer_needs_it = parent.writer is not None and parent.writer.status == "running"  # its blocks were counted
        return self.pool.fill(tail) == fill and not writer_needs_it

    def _settle_tail(
        self, node: KVNode, tail: BlockId | None, taken: list[BlockId], *, in_place: bool
    ) -> list[tuple[BlockId, BlockId]]:
        if tail is None:
            return []
        if in_place:
            if not node.blocks:
                self.pool.share(tail)
                node.blocks.append(tail)
            return []
        self.num_copies += 1
        if node.blocks:
            self.pool.release([node.blocks.pop()])
        return [(tail, taken[0])]

    def _joined_blocks(self, node: KVNode) -> list[tuple[int, int, int]]:
        """Runs of adjacent blocks: (first position, position past the last, slot of the first)."""
        size = self.pool.block_size
        runs: list[tuple[int, int, int]] = []
        begin = node.start // size * size
        for block in node.blocks:
            if runs and runs[-1][2] + runs[-1][1] - runs[-1][0] == block * size:
                runs[-1] = (runs[-1][0], runs[-1][1] + size, runs[-1][2])
            else:
                runs.append((begin, begin + size, block * size))
            begin += size
        return runs

    def _check_node(self, node: KVNode, attached: dict[int, int]) -> None:
        name = f"node {node.node_id}"
        assert node.is_live, f"{name} was freed"
        assert node.attached == attached, f"{name}: attached {node.attached}, derived {attached}"
        assert node.attached or node.writer is not None, f"{name} is held by nobody"
        assert node.num_computed <= node.num_placed <= len(node.token_ids), f"{name}: counts out of order"
        live = max(node.attached, default=0)
        live = max(live, node.writer.offset if node.writer is not None else 0)
        assert live == len(node.token_ids), f"{name}: {len(node.token_ids)} tokens, {live} reachable"
        size = self.pool.block_size
        want = -(-(node.start + node.num_placed) // size) - node.start // size if node.num_placed else 0
        assert len(node.blocks) == want, f"{name}: {len(node.blocks)} blocks, {want} needed"
        if node.parent is not None and node.num_placed:
            assert node.parent.num_placed >= node.offset, f"{name} is placed before its parent"


def _count(counts: dict[int, int], key: int) -> None:
    counts[key] = counts.get(key, 0) + 1
