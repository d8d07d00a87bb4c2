"""From a plan to the work of a persistent kernel: arrays of numbers, without torch.

Rows are cut into tiles, so many rows that with the query heads of one K/V head they fill the M dimension of a matrix
product. A tile reads the union of its rows' keys, each key once, in blocks of `block_keys`:

    rows            keys that the tile reads                                         blocks
    tile 0  0..15   trunk [0, 8192)        leaves of rows 0..15, side by side        strips: trunk | gathers: leaves
    tile 1  16..31  trunk [0, 8192)        leaves of rows 16..31

A *strip* is a run of whole blocks of adjacent slots that a range of the tile's rows reads: no key of it needs a mask.
It is listed block by block, so that the kernel's pipeline runs on from one strip into the next. All other keys are
*gathered*: blocks of `block_keys // entry_keys` entries, each a few adjacent slots with the rows that read them, so
that the short leaves of many rows fill one block and paged nodes need no copy. Where an entry has too few keys, its
last one stands in for the missing, which no row reads: loads need no mask, and nothing unwritten is touched.

The blocks of all (tile, K/V head) pairs, one after the other, are a line that is cut into equal shares, one for each
program, as Stream-K does with matrix products (Osama et al., PPoPP 2023). What a program does of one pair is an item.
A pair of one item writes its output; the items of others leave partial results, merged by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dendrite.engine.attention.runs import Ints, Runs, bounds_of, cut_rows, ranges_of, runs_of, segments_of, steps_of
from dendrite.engine.batch import Plan

Packed = NDArray[np.int32]

ITEM_FIELDS = 8
"""Numbers of an item: row_start, num_rows, head, first and last strip block, first and last gathered block, slot of its
partial result (-1: none)."""
STRIP_FIELDS = 2
"""Numbers of a strip's block: slot of its first key; the rows that read it, first + (last << 8)."""
ENTRY_FIELDS = 2
"""Numbers of an entry: slot of its first key times `entry_keys` plus how many keys follow it; the rows that read them,
packed by `_readers`."""
PAIR_FIELDS = 4
"""Numbers of a (tile, K/V head) pair: first partial result, how many, the tile's first row, unused."""
HEADER_FIELDS = 8
"""Numbers of the header: num_rows, then where each section starts."""
STRIP_COST, GATHER_COST = 2, 3
"""Of a strip's block and of a gathered one, which takes twice the instructions where those are what takes the time."""
MAX_UNEVEN = 1.2
"""Pairs are not cut if so the largest share is at most this many times the mean: programs that walk along the same keys
side by side find them in the cache, and nothing is left to merge."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """What the kernel is compiled for."""

    num_programs: int
    num_kv_heads: int
    tile_rows: int
    """Rows of a tile: at most 255."""
    block_keys: int
    """Keys of one block."""
    entry_keys: int
    """Most keys of an entry; divides `block_keys`."""
    min_strip_blocks: int = 1
    """Shorter runs of adjacent slots are gathered."""
    min_share: int = 2
    """Fewest blocks a program is given, if it is given any: smaller shares cost more to merge than they save."""


@dataclass(frozen=True, slots=True)
class WorkList:
    """A step's work, the same for all layers."""

    num_rows: int
    items: Packed
    """[num_items, ITEM_FIELDS], in the order of the line."""
    starts: Packed
    """[num_programs + 1]: the items of program p are `[starts[p], starts[p + 1])`."""
    strips: Packed
    """[num_strip_blocks, STRIP_FIELDS]"""
    entries: Packed
    """[num_gathered_blocks * block_keys // entry_keys, ENTRY_FIELDS]"""
    row_tiles: Packed
    """[num_rows]: each row's tile."""
    pairs: Packed
    """[num_tiles * num_kv_heads, PAIR_FIELDS], tile by tile."""
    num_partials: int

    @property
    def size(self) -> int:
        """Numbers of the packed form."""
        return HEADER_FIELDS + sum(part.size for part in self._sections())

    def pack(self, into: Packed) -> None:
        """Write the header and all sections one after the other; `into` holds `size` numbers."""
        at = HEADER_FIELDS
        into[0] = self.num_rows
        for index, section in enumerate(self._sections(), start=1):
            into[index] = at
            into[at : at + section.size] = section.reshape(-1)
            at += section.size

    def _sections(self) -> tuple[Packed, ...]:
        return (self.starts, self.items, self.strips, self.entries, self.row_tiles, self.pairs)


def build(plan: Plan, tiling: Tiling) -> WorkList:
    """The work list of a plan."""
    segments = segments_of(plan)
    bounds = cut_rows(segments, plan.num_rows, tiling.tile_rows)
    runs, num_tiles = runs_of(segments, bounds), len(bounds) - 1
    is_strip = (runs.is_causal == 0) & (runs.length >= tiling.min_strip_blocks * tiling.block_keys)
    strips, rest = _split_strips(runs, is_strip, tiling.block_keys)
    strip_bounds = bounds_of(np.bincount(strips.tile, strips.length // tiling.block_keys, num_tiles))
    entries, gather_bounds = _entries(rest, num_tiles, tiling)
    line = _Line(tiling, bounds, strip_bounds, gather_bounds)
    return WorkList(
        num_rows=plan.num_rows,
        items=line.items(),
        starts=line.starts,
        strips=_strips(strips, tiling.block_keys),
        entries=entries,
        row_tiles=np.repeat(np.arange(num_tiles, dtype=np.int32), steps_of(bounds)),
        pairs=line.pairs(),
        num_partials=line.num_partials,
    )


def _split_strips(runs: Runs, is_strip: NDArray[np.bool_], block_keys: int) -> tuple[Runs, Runs]:
    """Whole blocks of the long runs; the short runs and the long ones' remainders, both ordered by tile."""
    if not is_strip.any():
        return runs[:0], runs
    whole = np.where(is_strip, runs.length // block_keys * block_keys, 0)
    strips = Runs(runs.tile, runs.slot, whole, runs.low, runs.high, runs.is_causal)[is_strip]
    rest = Runs(runs.tile, runs.slot + whole, runs.length - whole, runs.low, runs.high, runs.is_causal)
    return strips, rest[rest.length > 0]


def _strips(strips: Runs, block_keys: int) -> Packed:
    counts = strips.length // block_keys
    packed = np.empty((int(counts.sum()), STRIP_FIELDS), np.int32)
    packed[:, 0] = strips.slot.repeat(counts) + ranges_of(counts) * block_keys
    packed[:, 1] = np.repeat(strips.low | strips.high << 8, counts)
    return packed


def _entries(runs: Runs, num_tiles: int, tiling: Tiling) -> tuple[Packed, Ints]:
    """Entries of all tiles, filled up to whole blocks with empty ones; each tile's first block, [num_tiles + 1]."""
    size, per_block = tiling.entry_keys, tiling.block_keys // tiling.entry_keys
    counts = -(-runs.length // size)
    run = np.repeat(np.arange(len(counts)), counts)
    offset = ranges_of(counts) * size
    per_tile = np.bincount(runs.tile, counts, num_tiles).astype(np.int64)
    blocks = bounds_of(-(-per_tile // per_block))
    tile = runs.tile[run]
    place = np.arange(len(run)) + (blocks[:-1] * per_block - bounds_of(per_tile)[:-1])[tile]
    num_keys = np.minimum(runs.length[run] - offset, size)
    packed = np.zeros((blocks[-1] * per_block, ENTRY_FIELDS), np.int32)
    if len(run):  # what fills the last block of a tile repeats a key that is there: the line's first will do
        packed[:, 0] = runs.slot[0] * size
    packed[place, 0] = (runs.slot[run] + offset) * size + num_keys - 1
    packed[place, 1] = _readers(runs, run, offset, num_keys)
    return packed, blocks


def _readers(runs: Runs, run: Ints, offset: Ints, num_keys: Ints) -> Ints:
    """Bits 0-7 the number of keys, 8-15 the first of the tile's rows that read them, 16-23 the last, 24 if causal."""
    is_causal = runs.is_causal[run]
    low = runs.low[run] + is_causal * offset
    return num_keys | low << 8 | runs.high[run] << 16 | is_causal << 24


class _Line:
    """All blocks of all (tile, K/V head) pairs in a row, cut into the programs' shares."""

    def __init__(self, tiling: Tiling, bounds: Ints, strip_bounds: Ints, gather_bounds: Ints) -> None:
        heads = tiling.num_kv_heads
        self._heads, self._bounds = heads, bounds
        self._strips, self._gathers = strip_bounds, gather_bounds
        self._pair_starts = bounds_of(np.repeat(steps_of(strip_bounds) + steps_of(gather_bounds), heads))
        cuts = self._cuts(tiling)
        self._item_starts = np.unique(np.concatenate((cuts, self._pair_starts)))
        self._pair = np.searchsorted(self._pair_starts, self._item_starts[:-1], side="right") - 1
        self._per_pair = np.bincount(self._pair, minlength=len(self._pair_starts) - 1)
        is_partial = self._per_pair[self._pair] > 1
        self.num_partials = int(is_partial.sum())
        self._partial = np.where(is_partial, is_partial.cumsum() - 1, -1)
        self.starts = np.full(tiling.num_programs + 1, len(self._pair), np.int32)
        self.starts[: len(cuts)] = np.searchsorted(self._item_starts, cuts)

    def _cuts(self, tiling: Tiling) -> Ints:
        """Where the programs' shares begin and end, in blocks: [num_shares + 1]."""
        num_strips = np.repeat(steps_of(self._strips), self._heads)
        num_gathers = np.repeat(steps_of(self._gathers), self._heads)
        costs = bounds_of(STRIP_COST * num_strips + GATHER_COST * num_gathers)
        total = int(costs[-1])
        shares = max(1, min(tiling.num_programs, total // (STRIP_COST * tiling.min_share)))
        cuts = np.arange(shares + 1) * total // shares
        whole = np.searchsorted((costs[:-1] + costs[1:]) / 2, cuts)  # the pair that starts nearest to each cut
        if np.diff(costs[whole]).max() * shares <= MAX_UNEVEN * total:
            uncut: Ints = self._pair_starts[whole]
            return uncut
        pair = np.minimum(np.searchsorted(costs, cuts, side="right") - 1, len(num_strips) - 1)
        cost = cuts - costs[pair]
        in_strips = np.minimum(cost // STRIP_COST, num_strips[pair])
        in_gathers = np.maximum(cost - STRIP_COST * num_strips[pair], 0) // GATHER_COST
        cut: Ints = self._pair_starts[pair] + in_strips + in_gathers
        return cut

    def items(self) -> Packed:
        """[num_items, ITEM_FIELDS]."""
        tile = self._pair // self._heads
        first = self._item_starts[:-1] - self._pair_starts[self._pair]
        last = self._item_starts[1:] - self._pair_starts[self._pair]
        num_strips = steps_of(self._strips)[tile]
        items = np.empty((len(tile), ITEM_FIELDS), np.int32)
        items[:, 0] = self._bounds[tile]
        items[:, 1] = steps_of(self._bounds)[tile]
        items[:, 2] = self._pair % self._heads
        items[:, 3] = self._strips[tile] + np.minimum(first, num_strips)
        items[:, 4] = self._strips[tile] + np.minimum(last, num_strips)
        items[:, 5] = self._gathers[tile] + np.maximum(first - num_strips, 0)
        items[:, 6] = self._gathers[tile] + np.maximum(last - num_strips, 0)
        items[:, 7] = self._partial
        return items

    def pairs(self) -> Packed:
        """[num_pairs, PAIR_FIELDS]."""
        pairs = np.zeros((len(self._per_pair), PAIR_FIELDS), np.int32)
        first_item = bounds_of(self._per_pair)[:-1]
        pairs[:, 0] = self._partial[np.minimum(first_item, len(self._partial) - 1)] if len(self._partial) else 0
        pairs[:, 1] = self._per_pair
        pairs[:, 2] = np.repeat(self._bounds[:-1], self._heads)
        return pairs
