"""The KV tree: append-only runs of tokens that own blocks; children attached at (node, offset). No tensor is touched.

    root  [s y s t e m . . p r o m p t]          a `KVNode`: 13 tokens, blocks 1 2 3 4 (block size 4)
           └── attached at 13 ──┬── a [x y z]    wrote first: goes on in block 4, slot 1, and shares it
                                └── b [u v]      wrote second: block 4 is copied to block 9, slot 0 only

`fork` adds a holder at (node, offset) and nothing else. Who writes takes blocks: the first writer at a block's fill
point goes on in place, any other copies that one block. What nobody can reach any more is released at once: beyond
the largest live offset of a node, and the whole node when nothing is attached to it. "Released" means that whoever asks
for blocks gets them; until then what was computed stays cached, and a new root may begin on it (`node_store.py`, which
also says who owns what).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dendrite.engine.blocks import BlockPool
from dendrite.engine.errors import OutOfBlocks
from dendrite.engine.ids import BlockId, NodeId
from dendrite.engine.node_store import NodeStore, live_length
from dendrite.engine.nodes import KVNode, Tip
from dendrite.engine.prefixes import longest_match
from dendrite.engine.swap import Stored


class KVTree:
    """All nodes of one engine over one block pool. Not thread-safe: the engine's lock guards it."""

    def __init__(self, pool: BlockPool, *, drop_stored: Callable[[Stored], None] = lambda _: None) -> None:
        self.pool = pool
        self.tips: set[Tip] = set()
        self.num_copies = 0
        self._store = NodeStore(pool, drop_stored)
        self.cache = self._store.cache

    @property
    def nodes(self) -> dict[NodeId, KVNode]:
        """All nodes, held and cached."""
        return self._store.nodes

    # --- the mutations users see -------------------------------------------------------------------------------

    def new_root(self, token_ids: Sequence[int], *, most_revived: int | None = None) -> tuple[Tip, int]:
        """A tip after `token_ids`, sharing the longest prefix that is there, of a block or more; and how much.

        At most `most_revived` cached blocks become used by it; None is no limit.
        """
        node, offset = longest_match(self._store.roots(token_ids[0]), token_ids, at_least=self.pool.block_size)
        while node is not None and most_revived is not None and self.cache.num_blocks_of(node) > most_revived:
            offset, node = node.offset, node.parent
        if node is None:
            tip = self._writing_tip(self._store.new_root(token_ids[0]))
            shared = 0
        else:
            tip = self._attach_tip(node, offset)
            shared = tip.length
            if saved := self._store.revive(node):
                self.cache.count_hit(saved)
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
                self._store.detach(node, tip.offset)
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
            self._store.cut(node, live_length(node))
            return
        self._unwrite(tip)
        old_node, old_offset = tip.node, tip.offset
        self._store.attach(node, offset)
        tip.node, tip.offset = node, offset
        self._store.let_go(tip, old_node, old_offset)

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

    def prune(self, tip: Tip, *, keep: bool = True) -> None:
        """Lets the tip go; others may have the blocks that nobody else reaches when this returns.

        Unless `keep` is set, what the tip wrote does not even stay cached.
        """
        self.tips.remove(tip)
        if not keep:
            self._unwrite(tip)
        self._store.let_go(tip, tip.node, tip.offset)

    def unload(self, node: KVNode, stored: Stored | None) -> None:
        """Takes a held node out of the pool; nothing held below it is there. `stored` is where its K/V is now."""
        self._store.unload(node, stored)

    def discard(self, block_id: BlockId) -> None:
        """Drops the K/V of every node that holds the block, and of all below them; the tokens stay."""
        self._store.discard(block_id)

    def clear_cache(self) -> None:
        """Frees everything that nobody holds."""
        self._store.clear_cache()

    # --- reading -----------------------------------------------------------------------------------------------

    def token_ids(self, tip: Tip, *, start: int = 0) -> list[int]:
        """The path's known tokens from absolute position `start` on."""
        pieces: list[list[int]] = []
        node: KVNode | None = tip.node
        offset = tip.offset - tip.num_ahead
        while node is not None and node.start + offset > start:
            pieces.append(node.token_ids[max(0, start - node.start) : offset])
            offset, node = node.offset, node.parent
        path: list[int] = []
        for piece in reversed(pieces):
            path += piece
        return path

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

    def num_known_kv(self, tip: Tip) -> int:
        """How many tokens from the root on have their K/V, in the pool or out of it."""
        node: KVNode | None = tip.node
        offset, known = tip.offset, tip.length
        while node is not None:
            stored = node.stored if node.stored is not None and not node.stored.is_lost else None
            num = stored.num_tokens if stored is not None else node.num_computed
            if num < offset:
                known = node.start + num
            offset, node = node.offset, node.parent
        return known

    def longest_known(self, token_ids: Sequence[int]) -> int:
        """How many tokens of a prompt somebody's path begins with, and have their K/V."""
        node, offset = longest_match(self._store.roots(token_ids[0]), token_ids, at_least=1)
        return self.num_known_kv(Tip(node, offset)) if node is not None else 0

    def spans(self, node: KVNode, first: int, last: int) -> list[tuple[int, int]]:
        """The slots of the node's tokens `[first, last)`: ranges in order, blocks that lie side by side joined."""
        if node.spans is None:
            node.spans = self._joined_blocks(node)
        low, high = node.start + first, node.start + last
        if len(node.spans) == 1:
            begin, _, slot = node.spans[0]
            return [(slot + low - begin, slot + high - begin)]
        return [
            (slot + max(low, begin) - begin, slot + min(high, end) - begin)
            for begin, end, slot in node.spans
            if begin < high and end > low
        ]

    def slots(self, node: KVNode, first: int, last: int) -> list[int]:
        """The slot of each of the node's tokens `[first, last)`."""
        return [slot for begin, end in self.spans(node, first, last) for slot in range(begin, end)]

    def has_stale_spans(self, node: KVNode) -> bool:
        """Whether `spans` would answer from blocks that are not the node's any more."""
        return node.spans is not None and node.spans != self._joined_blocks(node)

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
        if num_new > self.pool.num_available:
            raise OutOfBlocks(num_new, self.pool.num_available, 0)
        if in_place and tail is not None and node.blocks:
            self._store.make_sole(node, tail)
        copies = self._add_blocks(node, num_new, tail, in_place=in_place) if num_new or not node.blocks else []
        self.pool.set_fill(node.blocks[-1], (end - 1) % size + 1)
        node.num_placed = last
        return copies

    def copy_source(self, node: KVNode) -> BlockId | None:
        """The block that placing the node's next token copies; None if it copies none."""
        position = node.start + node.num_placed
        tail = self._tail_block(node, position)
        if tail is None or self._may_continue(node, tail, position % self.pool.block_size):
            return None
        return tail

    def check_integrity(self) -> None:
        """Asserts that every count can be derived again from tips and nodes, and free + cached + used = total."""
        self._store.check_integrity(self.tips)
        for node in self.nodes.values():
            assert not self.has_stale_spans(node), f"node {node.node_id} is read from blocks that are not its own"

    # --- holds -------------------------------------------------------------------------------------------------

    def _writing_tip(self, node: KVNode) -> Tip:
        tip = node.writer = Tip(node, 0)
        self.tips.add(tip)
        return tip

    def _unwrite(self, tip: Tip) -> None:
        """Nobody will want what the tip wrote onto its node: rolled back, or not even known yet."""
        node = tip.node
        if node.writer is not tip:
            return
        if node.attached:
            tip.offset = max(node.attached)
            self._store.cut(node, tip.offset)
        else:
            node.num_computed = 0

    def _branch_off(self, tip: Tip) -> KVNode:
        """A child node for a tip that may not write where it stands; the tip's hold becomes the child's."""
        parent = tip.node
        node = self._store.new_node(parent, tip.offset)
        if parent.writer is tip:
            parent.writer = None
            self._store.attach(parent, tip.offset)
        node.writer = tip
        tip.node, tip.offset = node, 0
        return node

    def _attach_tip(self, node: KVNode, offset: int) -> Tip:
        self._store.attach(node, offset)
        tip = Tip(node, offset)
        self.tips.add(tip)
        return tip

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

    def _add_blocks(
        self, node: KVNode, num_new: int, tail: BlockId | None, *, in_place: bool
    ) -> list[tuple[BlockId, BlockId]]:
        """Gives the node so many more blocks, and its part of the tail; the copy this needs."""
        self._store.make_room(num_new)
        num_before = len(node.blocks)
        behind = node.blocks[-1] if node.blocks else (tail if in_place else None)
        taken = self.pool.allocate(num_new, after=behind)
        copies = self._settle_tail(node, tail, taken, in_place=in_place)
        node.blocks.extend(taken)
        for block in node.blocks[-num_new - 1 :]:
            self.pool.set_fill(block, self.pool.block_size)
        if copies:
            node.spans = None
        elif node.spans is not None:
            self._join(node.spans, node.start // self.pool.block_size + num_before, node.blocks[num_before:])
        return copies

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
        runs: list[tuple[int, int, int]] = []
        self._join(runs, node.start // self.pool.block_size, node.blocks)
        return runs

    def _join(self, runs: list[tuple[int, int, int]], index: int, blocks: Sequence[BlockId]) -> None:
        """Adds blocks to such runs: the first of them covers positions from `index` block sizes on."""
        size = self.pool.block_size
        begin = index * size
        for block in blocks:
            if runs and runs[-1][2] + runs[-1][1] - runs[-1][0] == block * size:
                runs[-1] = (runs[-1][0], runs[-1][1] + size, runs[-1][2])
            else:
                runs.append((begin, begin + size, block * size))
            begin += size
