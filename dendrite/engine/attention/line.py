"""The line of a work list, all blocks of all (tile, K/V head) pairs one after the other, cut into the programs' shares.

    pairs       tile 0, head 0          tile 0, head 1          tile 1, head 0       tile 1, head 1
    blocks      s s s s s s g g         s s s s s s g g         s s s s g            s s s s g
    programs    0───────  1──────  2    ──────  3───────  4     ─────  5 …           s strip, g gathered

How it is cut depends on the number of blocks alone, not on where they lie. So it is kept: where branches grow, or are
forked from one place again and again, most steps have as many blocks as one of the last had.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Packed = NDArray[np.int32]

ITEM_FIELDS = 8
"""Numbers of an item: row_start, num_rows, head, first and last strip block, first and last gathered block, slot of its
partial result (-1: none)."""
PAIR_FIELDS = 4
"""Numbers of a (tile, K/V head) pair: first partial result, how many, the tile's first row, unused."""
STRIP_COST, GATHER_COST = 2, 3
"""Of a strip's block and of a gathered one, which takes twice the instructions where those are what takes the time."""
MAX_UNEVEN = 1.2
"""Pairs are not cut if so the largest share is at most this many times the mean: programs that walk along the same keys
side by side find them in the cache, and nothing is left to merge."""
PAIR_COST = 6
"""Of going on with another pair: its queries, its first keys and its result are waited for once more. So shares begin
where pairs do if that makes none longer by more than this."""


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
class Line:
    """How a line is cut. Plans share these arrays, so nobody can write to them."""

    items: Packed
    """[num_items, ITEM_FIELDS], in the order of the line."""
    starts: Packed
    """[num_programs + 1]: the items of program p are `[starts[p], starts[p + 1])`."""
    row_tiles: Packed
    """[num_rows]: each row's tile."""
    pairs: Packed
    """[num_tiles * num_kv_heads, PAIR_FIELDS], tile by tile."""
    packed: Packed
    """Starts, items, rows' tiles and pairs, one after the other."""

    @property
    def num_partials(self) -> int:
        """Items that leave a partial result."""
        return int((self.items[:, 7] >= 0).sum())


@lru_cache(maxsize=128)
def cut_line(tiling: Tiling, bounds: tuple[int, ...], strips: tuple[int, ...], gathers: tuple[int, ...]) -> Line:
    """Cut a line.

    Args:
        tiling: how many programs and K/V heads there are.
        bounds: each tile's first row, and the number of rows: [num_tiles + 1].
        strips: each tile's first strip block, and how many there are: [num_tiles + 1].
        gathers: the same of gathered blocks.
    """
    rows = np.array(bounds)
    cut = _Cut(tiling, rows, np.array(strips), np.array(gathers))
    row_tiles = np.arange(len(bounds) - 1, dtype=np.int32).repeat(_steps_of(rows))
    items, pairs = cut.items(), cut.pairs()
    packed = np.concatenate((cut.starts, items.reshape(-1), row_tiles, pairs.reshape(-1)))
    line = Line(items, cut.starts, row_tiles, pairs, packed)
    for array in (line.items, line.starts, line.row_tiles, line.pairs, line.packed):
        array.flags.writeable = False
    return line


class _Cut:
    """The arrays of a line in the making."""

    def __init__(self, tiling: Tiling, bounds: Ints, strip_bounds: Ints, gather_bounds: Ints) -> None:
        self._heads, self._bounds = tiling.num_kv_heads, bounds
        self._strips, self._gathers = strip_bounds, gather_bounds
        self._num_strips, self._num_gathers = _steps_of(strip_bounds), _steps_of(gather_bounds)
        self._pair_starts = _bounds_of((self._num_strips + self._num_gathers).repeat(self._heads))
        cuts = self._cuts(tiling)
        marks = np.concatenate((cuts, self._pair_starts))
        marks.sort()
        is_item = marks[1:] > marks[:-1]
        self._first, self._last = marks[:-1][is_item], marks[1:][is_item]
        self._pair = self._pair_starts.searchsorted(self._first, side="right") - 1
        self._per_pair = np.bincount(self._pair, minlength=len(self._pair_starts) - 1)
        is_partial = self._per_pair[self._pair] > 1
        self._partial = is_partial.cumsum() * is_partial - 1
        self.starts = np.full(tiling.num_programs + 1, len(self._pair), np.int32)
        self.starts[: len(cuts)] = self._first.searchsorted(cuts)

    def _cuts(self, tiling: Tiling) -> Ints:
        """Where the programs' shares begin and end, in blocks: [num_shares + 1]."""
        tile_costs = STRIP_COST * self._num_strips + GATHER_COST * self._num_gathers
        costs = _bounds_of(tile_costs.repeat(self._heads))
        total = int(costs[-1])
        shares = max(1, min(tiling.num_programs, total // (STRIP_COST * tiling.min_share)))
        even = np.arange(shares + 1) * total // shares
        whole = (costs[:-1] + costs[1:]).searchsorted(2 * even)  # the pair that starts nearest to each cut
        if int(_steps_of(costs[whole]).max()) * shares <= MAX_UNEVEN * total:
            uncut: Ints = self._pair_starts[whole]
            return uncut
        per_tile = _shares_of(tile_costs, shares // self._heads)
        if per_tile is None or (tile_costs / per_tile).max() > total / shares + PAIR_COST:
            return self._in_blocks(even, costs)
        per_pair = per_tile.repeat(self._heads)
        pair = np.arange(len(per_pair)).repeat(per_pair)
        number = np.arange(len(pair)) - _bounds_of(per_pair)[pair]  # of the share among its pair's
        cuts = costs[pair] + number * _steps_of(costs)[pair] // per_pair[pair]
        return self._in_blocks(np.append(cuts, total), costs)

    def _in_blocks(self, cuts: Ints, costs: Ints) -> Ints:
        """Cuts at costs as cuts between blocks; `costs` are those that pairs begin at."""
        pair = np.minimum(costs.searchsorted(cuts, side="right") - 1, len(costs) - 2)
        tile = pair // self._heads
        cost, num_strips = cuts - costs[pair], self._num_strips[tile]
        in_strips = np.minimum(cost // STRIP_COST, num_strips)
        in_gathers = np.maximum(cost - STRIP_COST * num_strips, 0) // GATHER_COST
        blocks: Ints = self._pair_starts[pair] + in_strips + in_gathers
        return blocks

    def items(self) -> Packed:
        """[num_items, ITEM_FIELDS]."""
        tile = self._pair // self._heads
        start, num_strips = self._pair_starts[self._pair], self._num_strips[tile]
        first, last = self._first - start, self._last - start
        items = np.empty((len(tile), ITEM_FIELDS), np.int32)
        items[:, 0] = self._bounds[tile]
        items[:, 1] = _steps_of(self._bounds)[tile]
        items[:, 2] = self._pair - tile * self._heads
        strips, gathers = self._strips[tile], self._gathers[tile] - num_strips
        items[:, 3] = strips + np.minimum(first, num_strips)
        items[:, 4] = strips + np.minimum(last, num_strips)
        items[:, 5] = gathers + np.maximum(first, num_strips)
        items[:, 6] = gathers + np.maximum(last, num_strips)
        items[:, 7] = self._partial
        return items

    def pairs(self) -> Packed:
        """[num_pairs, PAIR_FIELDS]."""
        pairs = np.zeros((len(self._per_pair), PAIR_FIELDS), np.int32)
        first_item = _bounds_of(self._per_pair)[:-1]
        if len(self._partial):
            pairs[:, 0] = self._partial[np.minimum(first_item, len(self._partial) - 1)]
        pairs[:, 1] = self._per_pair
        pairs[:, 2] = self._bounds[:-1].repeat(self._heads)
        return pairs


def _shares_of(costs: Ints, num_shares: int) -> Ints | None:
    """How many shares of its own each tile gets: few, and the largest small; None if there are fewer than tiles."""
    shares = np.maximum(costs * num_shares // max(1, int(costs.sum())), 1)
    if (left := num_shares - int(shares.sum())) < 0:
        return None
    for _ in range(left):
        shares[(costs / shares).argmax()] += 1
    longest = -(-(-(-costs // shares)).max() // STRIP_COST) * STRIP_COST  # in whole blocks
    enough: Ints = np.maximum(-(-costs // longest), 1)
    return enough


def _bounds_of(counts: Ints) -> Ints:
    """`[0, c0, c0 + c1, ...]`."""
    bounds = np.zeros(len(counts) + 1, np.int64)
    counts.cumsum(out=bounds[1:])
    return bounds


def _steps_of(bounds: Ints) -> Ints:
    """`[b1 - b0, b2 - b1, ...]`; `np.diff` takes three times as long for as few."""
    return bounds[1:] - bounds[:-1]
