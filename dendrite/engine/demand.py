"""Counts blocks before anything is taken: what requests may need at worst, what pruning would give back."""

from __future__ import annotations

from collections.abc import Iterable

from dendrite.engine.blocks import BlockPool
from dendrite.engine.ids import BlockId, NodeId
from dendrite.engine.nodes import KVNode, Tip


def demand(pool: BlockPool, wanted: Iterable[tuple[Tip, int, bool]]) -> int:
    """An upper bound of the blocks to take until each tip's path, and so many tokens beyond it, has slots.

    `wanted` lists (tip, tokens beyond it, whether a fork of the tip gets them rather than the tip itself).
    """
    upto: dict[NodeId, tuple[KVNode, int]] = {}
    blocks = 0
    for tip, num_more, is_fork in wanted:
        node: KVNode | None = tip.node
        offset = tip.offset
        if num_more and not is_fork and tip.node.writer is tip and offset == len(tip.node.token_ids):
            offset += num_more
        elif num_more:
            blocks += _blocks_between(pool, tip.length, tip.length + num_more)
        while node is not None and node.num_placed < offset:
            known = upto.get(node.node_id)
            if known is None or known[1] < offset:
                upto[node.node_id] = (node, offset)
            offset, node = node.offset, node.parent
    return blocks + sum(_blocks_to_place(pool, node, offset) for node, offset in upto.values())


def footprint(pool: BlockPool, wanted: Iterable[tuple[Tip, int, bool]]) -> int:
    """An upper bound of the blocks it takes to have each tip's path, and so many tokens beyond it, all in the pool."""
    upto: dict[NodeId, tuple[KVNode, int]] = {}
    blocks = 0
    for tip, num_more, is_fork in wanted:
        node: KVNode | None = tip.node
        offset = tip.offset
        if num_more and not is_fork and tip.node.writer is tip and offset == len(tip.node.token_ids):
            offset += num_more
        elif num_more:
            blocks += _blocks_between(pool, tip.length, tip.length + num_more)
        while node is not None:
            known = upto.get(node.node_id, (node, 0))[1]
            upto[node.node_id] = (node, max(offset, known, node.num_placed, _num_stored(node)))
            offset, node = node.offset, node.parent
    return blocks + sum(_blocks_between(pool, node.start, node.start + offset) for node, offset in upto.values())


def prunable(pool: BlockPool, busy: Iterable[Tip]) -> int:
    """Blocks that no path of a `busy` tip uses: what pruning every other branch would give back."""
    held: set[BlockId] = set()
    seen: dict[NodeId, int] = {}
    for tip in busy:
        node: KVNode | None = tip.node
        offset = tip.offset
        while node is not None and seen.get(node.node_id, -1) < offset:
            seen[node.node_id] = offset
            num = -(-(node.start + offset) // pool.block_size) - node.start // pool.block_size
            held.update(node.blocks[: max(num, 0)])
            offset, node = node.offset, node.parent
    return pool.num_used - len(held)


def _blocks_to_place(pool: BlockPool, node: KVNode, last: int) -> int:
    position = node.start + node.num_placed
    last = max(last, _num_stored(node))
    sole_owner = bool(node.blocks) and pool.ref_count(node.blocks[-1]) == 1
    if sole_owner:
        size = pool.block_size
        return -(-(node.start + last) // size) - -(-position // size)
    return _blocks_between(pool, position, node.start + last)


def _num_stored(node: KVNode) -> int:
    return 0 if node.stored is None else node.stored.num_tokens


def _blocks_between(pool: BlockPool, position: int, end: int) -> int:
    """Blocks for `[position, end)` by a writer that may have to copy the block it starts in."""
    size = pool.block_size
    return -(-end // size) - position // size
