"""A block pool whose block ids carry the generation they were handed out in, so that a stale one is noticed.

    allocate   block 4, tag 17          the pool's tag of block 4 is 17
    release    tag 17 is the pool's     the pool's tag of block 4 is 0
    release    tag 17 is not: fault     freed twice, or somebody else's by now

A tagged id is an `int` like any other, so the tree keeps it in its lists and knows nothing of tags. Only engines that
ask for `integrity` have such a pool; the others pay nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn, cast

from dendrite.engine.blocks import BlockPool
from dendrite.engine.ids import BlockId, NodeId

FREE = 0
"""The tag of a block that nobody has."""


class TaggedBlock(int):
    """A block id with the generation it was handed out in, and, once it was seen there, where in which node it lies."""

    tag: int
    node: NodeId | None = None
    index: int | None = None
    """Absolute: the block holds the path's tokens from `index * block_size` on."""


class GuardedPool(BlockPool):
    """A `BlockPool` that tells a stale or foreign block id from its own, and keeps its last block as a guard."""

    def __init__(self, num_blocks: int, block_size: int, *, on_fault: Callable[[BlockId, str], NoReturn]) -> None:
        """Guard `num_blocks` blocks, the trash block and the guard among them.

        Args:
            num_blocks: see `BlockPool`; the last one is never handed out.
            block_size: slots in a block.
            on_fault: told the block and what is wrong with it, before anything was changed; it raises.
        """
        super().__init__(num_blocks - 1, block_size)
        self.guard = BlockId(num_blocks - 1)
        self._on_fault = on_fault
        self._tags = [FREE] * num_blocks
        self._next_tag = itertools.count(FREE + 1)

    def why_stale(self, block_id: BlockId) -> str | None:
        """What is wrong with a block id that somebody holds; None if it is good."""
        if not isinstance(block_id, TaggedBlock):
            return "was never handed out to its holder"
        tag = self.tag(block_id)
        if tag == block_id.tag:
            return None
        return "was freed while it was held" if tag == FREE else "was freed while it was held, and is another's now"

    def tag(self, block_id: BlockId) -> int:
        """The generation the block was last handed out in, `FREE` if nobody has it."""
        return self._tags[block_id] if 0 <= block_id < len(self._tags) else FREE

    def allocate(self, num: int, *, after: BlockId | None = None) -> list[BlockId]:
        """See `BlockPool`."""
        return [self._tagged(block) for block in super().allocate(num, after=after)]

    def share(self, block_id: BlockId) -> None:
        """See `BlockPool`."""
        self._check((block_id,))
        super().share(block_id)

    def release(self, block_ids: Iterable[BlockId]) -> None:
        """See `BlockPool`."""
        blocks = list(block_ids)
        self._check(blocks)
        super().release(_plain(blocks))
        self._forget_free(blocks)

    def keep(self, block_ids: Iterable[BlockId]) -> None:
        """See `BlockPool`."""
        blocks = list(block_ids)
        self._check(blocks)
        super().keep(blocks)

    def drop(self, block_ids: Iterable[BlockId]) -> None:
        """See `BlockPool`."""
        blocks = list(block_ids)
        self._check(blocks)
        super().drop(_plain(blocks))
        self._forget_free(blocks)

    def _check(self, blocks: Iterable[BlockId]) -> None:
        for block in blocks:
            if (why := self.why_stale(block)) is not None:
                self._on_fault(block, why)

    def _tagged(self, block: BlockId) -> BlockId:
        tagged = TaggedBlock(block)
        tagged.tag = self._tags[block] = next(self._next_tag)
        return cast("BlockId", tagged)

    def _forget_free(self, blocks: Iterable[BlockId]) -> None:
        for block in blocks:
            if not self._is_owned(block):
                self._tags[block] = FREE


def _plain(blocks: Iterable[BlockId]) -> Iterator[BlockId]:
    """Ids without their tags: free runs are nobody's."""
    return (BlockId(int(block)) for block in blocks)
