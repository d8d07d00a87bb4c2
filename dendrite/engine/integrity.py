"""Checks what a step is about to read: whose blocks they are, and that their K/V is what was computed.

    canary      every block of every path in the step: its tag, its place, its holder; what the plan reads and writes;
                a guard block behind the pool that nobody may write
    checksum    that, and a few full blocks of the step a time, in turns, against the sum taken when they were full

What is wrong with bookkeeping (a stale, foreign or twice freed block) ends the engine: nobody knows who else believes
it. What is wrong with a block's K/V ends the calls that read it; it is dropped with all that was computed on it, and
computed again from the tokens when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dendrite.engine.batch import Batch
from dendrite.engine.errors import IntegrityError
from dendrite.engine.guarded_pool import GuardedPool, TaggedBlock
from dendrite.engine.ids import TRASH_BLOCK, BlockId, NodeId
from dendrite.engine.nodes import KVNode, Tip
from dendrite.engine.step import Step
from dendrite.engine.swap import SwapSpace
from dendrite.engine.tree import KVTree

SAMPLED_BLOCKS = 4
"""Full blocks whose sums are looked at in a step; `n` blocks that are read again and again are all seen in n / 4."""
AT_ONCE = 256
"""Blocks summed in one go where all are looked at."""


class Guard:
    """The checks of one engine. `damaged` and `keep_sums` run on the loop's thread, the rest under the lock."""

    def __init__(self, tree: KVTree, pool: GuardedPool, swap: SwapSpace, *, has_sums: bool) -> None:
        self._tree = tree
        self._pool = pool
        self._swap = swap
        self._has_sums = has_sums
        self._sums: dict[int, tuple[int, int]] = {}  # full block -> its tag and its sum when it was full
        self._turn = 0
        self._due: list[BlockId] = []
        (self._untouched,) = swap.mover.digests([pool.guard])

    # --- bookkeeping -------------------------------------------------------------------------------------------

    def check(self, step: Step) -> None:
        """Holds everything the step reads and writes against the pool's tags.

        Raises:
            IntegrityError: something is stale; it is fatal.
        """
        if step.batch is None:
            return
        nodes = _paths_of(run.node for run, _, _ in step.runs)
        for node in nodes:
            self._check_node(node)
        self._check_plan(step.batch, {block for node in nodes for block in node.blocks})
        if self._has_sums:
            written = {slot // self._pool.block_size for slot in step.batch.slots}
            for block_id in written:
                self._sums.pop(block_id, None)
            full = (block for node in nodes for block in node.blocks[: self._num_full(node)])
            self._due = [block for block in full if block not in written]

    def check_all(self) -> list[IntegrityError]:
        """Looks at every node, the guard and every sum; damaged blocks, one error each.

        Raises:
            IntegrityError: something is stale; it is fatal.
        """
        for node in self._tree.nodes.values():
            self._check_node(node)
        damaged: list[BlockId] = []
        blocks = [block for node in self._tree.nodes.values() for block in node.blocks if int(block) in self._sums]
        for first in range(0, len(blocks), AT_ONCE):
            damaged += self._compare(blocks[first : first + AT_ONCE])
        self._compare([])
        return [self._damage(block) for block in dict.fromkeys(damaged)]

    def fault(self, block: BlockId, why: str) -> IntegrityError:
        """The error that names a block, the node that has it and a branch that reads it."""
        holders = self._holders(block)
        return _error(block, why, holders[0] if holders else None, self._reader(holders), is_fatal=True)

    def _check_node(self, node: KVNode) -> None:
        first = node.start // self._pool.block_size
        for index, block in enumerate(node.blocks, first):
            why = self._pool.why_stale(block)
            if why is None:
                assert isinstance(block, TaggedBlock)
                why = _why_misplaced(block, node, index)
            if why is not None:
                raise _error(block, why, node, self._reader([node]), is_fatal=True)
        if self._tree.has_stale_spans(node):
            raise _error(node.blocks[-1], "is not where the plan reads it", node, self._reader([node]), is_fatal=True)

    def _check_plan(self, batch: Batch, owned: set[BlockId]) -> None:
        size = self._pool.block_size
        written = {slot // size for slot in batch.slots} - {TRASH_BLOCK}
        read = {
            block
            for segment in batch.plan.segments
            for first, last in segment.spans
            for block in range(first // size, (last - 1) // size + 1)
        }
        for block in (written | read) - owned:
            raise self.fault(BlockId(block), "is used by a step and belongs to none of its branches")

    # --- K/V ---------------------------------------------------------------------------------------------------

    def damaged(self) -> list[IntegrityError]:
        """Looks at the guard, and at the next few of the blocks that the checked step reads; one error a bad block.

        Raises:
            IntegrityError: the guard was written to; it is fatal.
        """
        due, self._due = self._due, []
        num = min(SAMPLED_BLOCKS, len(due))
        chosen = [due[(self._turn + index) % len(due)] for index in range(num)]
        self._turn += num
        return [self._damage(block) for block in self._compare(chosen)]

    def keep_sums(self, step: Step) -> None:
        """Takes the sums of blocks that the step has filled."""
        if not self._has_sums:
            return
        full = [
            block
            for run, epoch, _ in step.runs
            if run.is_kept and run.node.epoch == epoch
            for block in self._blocks_of(run.node, run.start, run.end)[: self._num_filled(run.node, run.start, run.end)]
        ]
        if full:
            self._record(full, self._swap.mover.digests(full))

    def readers(self, error: IntegrityError) -> set[NodeId]:
        """Nodes that hold the damaged block; whoever has one on its path may have read it."""
        return {node.node_id for node in self._holders(BlockId(error.block))}

    def discard(self, error: IntegrityError) -> None:
        """Drops the K/V of the damaged block's nodes and of all below them; none of them is on a running path."""
        self._tree.discard(BlockId(error.block))
        self._sums.pop(error.block, None)

    def _compare(self, blocks: Sequence[BlockId]) -> list[BlockId]:
        """Those that are not what they were; blocks without a sum get one."""
        *sums, guard = self._swap.mover.digests([*blocks, self._pool.guard])
        if guard != self._untouched:
            raise _error(self._pool.guard, "is a guard, and was written to", None, None, is_fatal=True)
        bad: list[BlockId] = []
        for block, found in zip(blocks, sums, strict=True):
            tag, known = self._sums.get(block, (0, 0))
            if tag == self._pool.tag(block) and known != found:
                bad.append(block)
            else:
                self._record([block], [found])
        return bad

    def _record(self, blocks: Sequence[BlockId], sums: Sequence[int]) -> None:
        for block, found in zip(blocks, sums, strict=True):
            self._sums[int(block)] = (self._pool.tag(block), found)

    def _damage(self, block: BlockId) -> IntegrityError:
        holders = self._holders(block)
        why = "holds other K/V than was computed; it is computed again when it is needed"
        return _error(block, why, holders[0] if holders else None, self._reader(holders), is_fatal=False)

    # --- finding -----------------------------------------------------------------------------------------------

    def _num_full(self, node: KVNode) -> int:
        return self._num_filled(node, 0, node.num_computed)

    def _num_filled(self, node: KVNode, start: int, end: int) -> int:
        size = self._pool.block_size
        return (node.start + end) // size - (node.start + start) // size

    def _blocks_of(self, node: KVNode, start: int, end: int) -> list[BlockId]:
        """The blocks that hold the node's tokens `[start, end)`."""
        size = self._pool.block_size
        base = node.start // size
        return node.blocks[(node.start + start) // size - base : (node.start + end - 1) // size - base + 1]

    def _holders(self, block: BlockId) -> list[KVNode]:
        return sorted((node for node in self._tree.nodes.values() if block in node.blocks), key=lambda node: node.start)

    def _reader(self, nodes: Sequence[KVNode]) -> Tip | None:
        """A branch that has one of the nodes on its path, the user's own first."""
        wanted = {node.node_id for node in nodes}
        tips = sorted(self._tree.tips, key=lambda tip: (tip.depth is None, tip.depth or 0, tip.length))
        return next((tip for tip in tips if wanted.intersection(map(_id_of, _paths_of([tip.node])))), None)


def _why_misplaced(block: TaggedBlock, node: KVNode, index: int) -> str | None:
    """Whether the block is another node's: only nodes below the first that had it may have it, at the same place."""
    if block.node is None:
        block.node, block.index = node.node_id, index
        return None
    if block.index != index:
        return f"holds the path's tokens from block {block.index} on, not from block {index}"
    above: KVNode | None = node
    while above is not None:
        if above.node_id == block.node:
            return None
        above = above.parent
    return f"belongs to node {block.node}"


def _paths_of(ends: Iterable[KVNode]) -> list[KVNode]:
    """Every node on the paths to these, once, parents before children."""
    found: dict[NodeId, KVNode] = {}
    for end in ends:
        path: list[KVNode] = []
        node: KVNode | None = end
        while node is not None and node.node_id not in found:
            path.append(node)
            node = node.parent
        found.update((each.node_id, each) for each in reversed(path))
    return list(found.values())


def _id_of(node: KVNode) -> NodeId:
    return node.node_id


def _error(block: BlockId, why: str, node: KVNode | None, tip: Tip | None, *, is_fatal: bool) -> IntegrityError:
    if tip is not None:
        branch = f"the branch of {tip.num_known} tokens at depth {tip.depth or 0}"
    elif node is not None:
        branch = f"a branch of {node.start + len(node.token_ids)} tokens that was just let go"
    else:
        branch = "no branch"
    return IntegrityError(why, branch=branch, node=node.node_id if node else None, block=int(block), is_fatal=is_fatal)
