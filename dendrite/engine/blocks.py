"""The block pool: fixed runs of K/V slots, counted by reference, handed out side by side where it can.

    block   0    1    2    3    4    5    6    7    8    9
            ·    A    A    A    ░    ░    B    ░    ░    ░        · trash   ░ free
                                ^ A grows into 4 and 5 (`after=3`), B into 7 …

A node whose blocks lie side by side is one span of slots, which attention reads as a view. So a new run starts inside
the longest free stretch and leaves a gap behind the block before it, for that block's owner to grow into.

A block is used while a held node owns it, cached while only cached nodes do, else free. Cached blocks count as
available: the tree evicts them when somebody needs a block.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from dendrite.engine.ids import TRASH_BLOCK, BlockId

GROWTH_GAP = 8
"""Blocks left free behind a neighbour when a new run starts: 128 tokens at the default block size."""


class BlockPool:
    """`num_blocks` blocks of `block_size` slots; block 0 is the trash block and never handed out.

    The caller sees to `num_free` first; asking for more than that is a bug in the caller, not a user's error.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_total = num_blocks - 1
        self.num_free = self.num_total
        self.num_cached = 0
        self._ref_counts = [0] * num_blocks  # held nodes that own the block
        self._num_keepers = [0] * num_blocks  # cached nodes that do
        self._fill = [0] * num_blocks
        self._ref_counts[TRASH_BLOCK] = 1
        self._run_lengths: dict[int, int] = {}  # first block of a free run -> its length
        self._run_starts: dict[int, int] = {}  # block just past a free run -> its first block
        self._longest: list[tuple[int, int]] = []  # heap of (-length, first); stale entries are dropped when met
        if self.num_total:
            self._add_run(1, self.num_total)

    @property
    def num_used(self) -> int:
        """Blocks that a held node owns, the trash block apart."""
        return self.num_total - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that can be had at once: free ones, and cached ones that would be evicted."""
        return self.num_free + self.num_cached

    @property
    def longest_free(self) -> int:
        """Blocks in the longest free stretch."""
        return -self._longest_run()[0] if self.num_free else 0

    def ref_count(self, block_id: BlockId) -> int:
        """How many held nodes own the block."""
        return self._ref_counts[block_id]

    def is_kept(self, block_id: BlockId) -> bool:
        """Whether cached nodes own the block, maybe beside held ones."""
        return self._num_keepers[block_id] > 0

    def is_cached(self, block_id: BlockId) -> bool:
        """Whether only cached nodes own the block."""
        return not self._ref_counts[block_id] and self._num_keepers[block_id] > 0

    def fill(self, block_id: BlockId) -> int:
        """How many leading slots of the block have been given to a writer."""
        return self._fill[block_id]

    def set_fill(self, block_id: BlockId, num_slots: int) -> None:
        """Records that the first `num_slots` slots have a writer."""
        self._fill[block_id] = num_slots

    def allocate(self, num: int, *, after: BlockId | None = None) -> list[BlockId]:
        """Takes `num` blocks, each with one reference and nothing filled; next to `after` if those are free."""
        assert 0 <= num <= self.num_free, f"{num} blocks asked of {self.num_free}"
        taken: list[BlockId] = []
        first, gap = None if after is None else after + 1, 0
        while len(taken) < num:
            if first is None or first not in self._run_lengths:
                first, gap = self._start_of_new_run(num - len(taken))
            blocks = self._take(first, gap, num - len(taken))
            taken.extend(map(BlockId, blocks))
            first, gap = blocks.stop, 0
        for block in taken:
            self._ref_counts[block] = 1
            self._fill[block] = 0
        self.num_free -= num
        return taken

    def share(self, block_id: BlockId) -> None:
        """Adds an owner to a block that is used or cached."""
        assert self._is_owned(block_id), f"block {block_id} is free and can't be shared"
        self.num_cached -= self.is_cached(block_id)
        self._ref_counts[block_id] += 1

    def release(self, block_ids: Iterable[BlockId]) -> None:
        """Drops one reference of each; a block without any is cached if it is kept, else free at once."""
        for block in block_ids:
            assert block != TRASH_BLOCK, "block 0 has no owner and is never released"
            assert self._ref_counts[block] > 0, f"block {block} was released twice"
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if self._num_keepers[block]:
                self.num_cached += 1
            else:
                self._give_back(block)

    def keep(self, block_ids: Iterable[BlockId]) -> None:
        """A cached node becomes an owner of blocks that still have another one."""
        for block in block_ids:
            assert self._is_owned(block), f"block {block} is free and can't be kept"
            self._num_keepers[block] += 1

    def drop(self, block_ids: Iterable[BlockId]) -> None:
        """A cached node is an owner no more; a block without any is free at once."""
        for block in block_ids:
            assert self._num_keepers[block] > 0, f"block {block} was dropped twice"
            self._num_keepers[block] -= 1
            if not self._is_owned(block):
                self.num_cached -= 1
                self._give_back(block)

    def check_integrity(self, owners: dict[BlockId, int], keepers: dict[BlockId, int]) -> None:
        """Asserts that each block is owned by so many held and cached nodes, and that free + cached + used = total."""
        num_cached = 0
        for block in range(1, self.num_blocks):
            counts = (self._ref_counts[block], self._num_keepers[block])
            want = (owners.get(BlockId(block), 0), keepers.get(BlockId(block), 0))
            assert counts == want, f"block {block}: {counts} references of held and cached nodes, {want} such nodes"
            num_cached += self.is_cached(BlockId(block))
            assert 0 <= self._fill[block] <= self.block_size, f"block {block}: fill {self._fill[block]}"
        assert num_cached == self.num_cached, f"{num_cached} blocks are cached, {self.num_cached} counted"
        in_runs = sum(self._run_lengths.values())
        assert in_runs == self.num_free, f"{in_runs} blocks in free runs, {self.num_free} counted free"
        for first, length in self._run_lengths.items():
            assert self._run_starts.get(first + length) == first, f"free run at {first} has a wrong end"
            assert not any(map(self._is_owned, range(first, first + length))), f"free run at {first} holds a used block"

    def _is_owned(self, block: int) -> bool:
        return self._ref_counts[block] + self._num_keepers[block] > 0

    def _start_of_new_run(self, num: int) -> tuple[int, int]:
        """The longest free run, and the gap to leave in it for the neighbour to grow where there is room to spare."""
        less, first = self._longest_run()
        return first, min(GROWTH_GAP, (-less - num) // 4) if first > 1 else 0

    def _longest_run(self) -> tuple[int, int]:
        """(-length, first block) of the longest free run; there is one."""
        while self._run_lengths.get(self._longest[0][1]) != -self._longest[0][0]:
            heapq.heappop(self._longest)
        return self._longest[0]

    def _take(self, first: int, gap: int, num: int) -> range:
        """Up to `num` blocks of the free run that begins at `first`, from behind its first `gap` blocks on."""
        past = first + self._drop_run(first)
        if gap > 0:
            self._add_run(first, gap)
            first += gap
        end = min(first + num, past)
        if end < past:
            self._add_run(end, past - end)
        return range(first, end)

    def _give_back(self, block: int) -> None:
        self.num_free += 1
        first, length = block, 1
        if block + 1 in self._run_lengths:
            length += self._drop_run(block + 1)
        if block in self._run_starts:
            first = self._run_starts[block]
            length += self._drop_run(first)
        self._add_run(first, length)

    def _add_run(self, first: int, length: int) -> None:
        self._run_lengths[first] = length
        self._run_starts[first + length] = first
        if len(self._longest) > 4 * len(self._run_lengths) + 64:
            self._longest = [(-size, start) for start, size in self._run_lengths.items()]
            heapq.heapify(self._longest)
        else:
            heapq.heappush(self._longest, (-length, first))

    def _drop_run(self, first: int) -> int:
        length = self._run_lengths.pop(first)
        del self._run_starts[first + length]
        return length
