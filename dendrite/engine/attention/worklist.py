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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dendrite.engine.attention.line import Ints, Line, Packed, Tiling, cut_line
from dendrite.engine.attention.runs import Run, cut_rows, runs_of
from dendrite.engine.batch import Plan

STRIP_FIELDS = 2
"""Numbers of a strip's block: slot of its first key; the rows that read it, first + (last << 8)."""
ENTRY_FIELDS = 2
"""Numbers of an entry: slot of its first key times `entry_keys` plus how many keys follow it; the rows that read them,
in
bits: 0-7 the number of keys, 8-15 the first of the tile's rows that read them, 16-23 the last, 24 if causal."""
HEADER_FIELDS = 8
"""Numbers of the header: num_rows, then where each section starts."""
FEW_ENTRIES = 32
"""So many are listed in a loop before twelve array operations are done."""


@dataclass(frozen=True, slots=True)
class WorkList:
    """A step's work, the same for all layers."""

    num_rows: int
    line: Line
    strips: Packed
    """[num_strip_blocks, STRIP_FIELDS]"""
    entries: Packed
    """[num_gathered_blocks * block_keys // entry_keys, ENTRY_FIELDS]"""

    @property
    def size(self) -> int:
        """Numbers of the packed form."""
        return HEADER_FIELDS + self.line.packed.size + self.strips.size + self.entries.size

    def pack(self, into: Packed) -> None:
        """Write the header and all sections, those of the line first; `into` holds `size` numbers or more."""
        line = self.line
        items = HEADER_FIELDS + line.starts.size
        row_tiles = items + line.items.size
        pairs = row_tiles + line.row_tiles.size
        strips = HEADER_FIELDS + line.packed.size
        entries, end = strips + self.strips.size, self.size
        into[:HEADER_FIELDS] = (self.num_rows, HEADER_FIELDS, items, strips, entries, row_tiles, pairs, 0)
        into[HEADER_FIELDS:strips] = line.packed
        into[strips:entries] = self.strips.reshape(-1)
        into[entries:end] = self.entries.reshape(-1)


def build(plan: Plan, tiling: Tiling) -> WorkList:
    """The work list of a plan."""
    bounds = cut_rows(plan, tiling.tile_rows)
    blocks = _Blocks(tiling, runs_of(plan, bounds))
    line = cut_line(tiling, tuple(bounds), tuple(blocks.strip_bounds), tuple(blocks.gather_bounds))
    return WorkList(plan.num_rows, line, blocks.strips(), blocks.entries())


class _Blocks:
    """The blocks of all tiles, one after the other: strips of the long runs, and entries of what is left.

    A run is listed as it would be if block, or entry, 0 of all of them were its own: number i is then i times as many
    keys further on.
    """

    def __init__(self, tiling: Tiling, tiles: Iterable[list[Run]]) -> None:
        self.strip_bounds = [0]
        """Each tile's first strip block, and how many there are: [num_tiles + 1]."""
        self.gather_bounds = [0]
        """Each tile's first gathered block, and how many there are: [num_tiles + 1]."""
        self._tiling = tiling
        self._per_block = tiling.block_keys // tiling.entry_keys
        self._strips: list[int] = []  # of each long run: number of blocks, slot, readers
        self._entries: list[int] = []  # of each run: number of entries, empty ones so far, slot, keys, readers, later
        self._num_entries = 0
        for runs in tiles:
            self._add_tile(runs)

    def _add_tile(self, runs: list[Run]) -> None:
        size, per_entry = self._tiling.block_keys, self._tiling.entry_keys
        min_strip = size * self._tiling.min_strip_blocks
        num_strips, num_entries = self.strip_bounds[-1], self._num_entries
        num_empty = self.gather_bounds[-1] * self._per_block - num_entries
        for slot, length, low, high, is_causal in runs:
            whole = 0 if is_causal or length < min_strip else length // size
            if whole:
                self._strips += (whole, slot - num_strips * size, low | high << 8)
                num_strips += whole
            if left := length - whole * size:
                behind, later = num_entries * per_entry, is_causal << 8
                readers = (low << 8 | high << 16 | is_causal << 24) - later * behind
                num = -(-left // per_entry)
                self._entries += (num, num_empty, slot + whole * size - behind, left + behind, readers, later)
                num_entries += num
        num_gathers = -(-(num_entries - self._num_entries) // self._per_block)
        self._num_entries = num_entries
        self.strip_bounds.append(num_strips)
        self.gather_bounds.append(self.gather_bounds[-1] + num_gathers)

    def strips(self) -> Packed:
        """[num_strip_blocks, STRIP_FIELDS]."""
        return _listed_strips(tuple(self._strips), self._tiling.block_keys)

    def entries(self) -> Packed:
        """[num_gathered_blocks * per_block, ENTRY_FIELDS]; what fills up a tile's last block is empty."""
        if self._num_entries <= FEW_ENTRIES:
            return self._few_entries()
        size = self._tiling.entry_keys
        num_empty, slot, length, readers, later = _repeated(self._entries, 6)
        number = np.arange(len(slot))
        key = number * size
        num_keys = np.minimum(length - key, size)
        packed = np.zeros((self.gather_bounds[-1] * self._per_block, ENTRY_FIELDS), np.int32)
        packed[:, 0] = self._entries[2] * size  # empty entries repeat a key that is there: the first run's
        place = number + num_empty
        packed[place, 0] = (slot + key) * size + num_keys - 1
        packed[place, 1] = num_keys + readers + later * key
        return packed

    def _few_entries(self) -> Packed:
        size, numbers, number = self._tiling.entry_keys, self._entries, 0
        packed = [numbers[2] * size, 0] * (self.gather_bounds[-1] * self._per_block) if numbers else []
        for first in range(0, len(numbers), 6):
            num, num_empty, slot, length, readers, later = numbers[first : first + 6]
            for key in range(number * size, (number + num) * size, size):
                num_keys, place = min(length - key, size), key // size + num_empty
                packed[2 * place] = (slot + key) * size + num_keys - 1
                packed[2 * place + 1] = num_keys + readers + later * key
            number += num
        return np.array(packed, np.int32).reshape(-1, ENTRY_FIELDS)


@lru_cache(maxsize=64)
def _listed_strips(records: tuple[int, ...], block_keys: int) -> Packed:
    """The blocks of strips; kept, because a trunk that branches are forked from stays where it is."""
    slot, readers = _repeated(records, 3)
    packed = np.empty((len(slot), STRIP_FIELDS), np.int32)
    packed[:, 0] = slot + np.arange(len(slot)) * block_keys
    packed[:, 1] = readers
    packed.flags.writeable = False
    return packed


def _repeated(numbers: Sequence[int], num_fields: int) -> Ints:
    """Records of `num_fields` numbers, of which the first says how often the others come: [num_fields - 1, num]."""
    fields = np.array(numbers, np.int64).reshape(-1, num_fields).T
    repeated: Ints = fields[1:].repeat(fields[0], 1)
    return repeated
