"""From a plan to the work of a persistent kernel: arrays of numbers, without torch.

Rows are cut into tiles, so many rows that with the query heads of one K/V head they fill the M dimension of a matrix
product. A tile reads the union of its rows' keys, each key once, in blocks of `block_keys`:

    rows            keys that the tile reads                                         blocks
    tile 0  0..15   trunk [0, 8192)        leaves of rows 0..15, side by side        strips: trunk | gathers: leaves
    tile 1  16..31  trunk [0, 8192)        leaves of rows 16..31

A *strip* is a run of whole blocks of adjacent slots that a range of the tile's rows reads: no key of it needs a mask.
All other keys are *gathered*: blocks of `block_keys // entry_keys` entries, each a few adjacent slots with the rows
that read them, so that the short leaves of many rows fill one block and paged nodes need no copy. Where an entry has
too few keys, its last one stands in for the missing, which no row reads: loads need no mask, and nothing unwritten is
touched.

The blocks of all (tile, K/V head) pairs, one after the other, are a line that is cut into equal shares, one for each
program, as Stream-K does with matrix products (Osama et al., PPoPP 2023). What a program does of one pair is an item.
A pair of one item writes its output; the items of others leave partial results, merged by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from dendrite.engine.batch import Plan

Ints = NDArray[np.int64]
Packed = NDArray[np.int32]

ITEM_FIELDS = 12
"""Numbers of an item: row_start, num_rows, head, first_strip, last_strip, first and last strip block, first and last
gathered block, slot of its partial result (-1: none), two unused."""
STRIP_FIELDS = 4
"""Numbers of a strip: its first block on the line of all strips' blocks, slot of its first key, first and last row."""
ENTRY_FIELDS = 2
"""Numbers of an entry: slot of its first key times `entry_keys` plus how many keys follow it; the rows that read them,
packed by `_readers`."""
PAIR_FIELDS = 4
"""Numbers of a (tile, K/V head) pair: first partial result, how many, the tile's first row, unused."""
HEADER_FIELDS = 8
"""Numbers of the header: num_rows, then where each section starts."""
MAX_ALIGNED_TILES = 64
"""So many tiles are cut where few keys are read on both sides; more are cut at equal lengths, to stay quick."""


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
    min_strip_blocks: int = 8
    """Shorter runs of adjacent slots are gathered: the kernel's pipeline starts anew with every strip."""
    min_share: int = 2
    """Fewest blocks a program is given, if it is given any: smaller shares cost more to merge than they save."""
    gather_cost: float = 1.0
    """Of a gathered block, in blocks of a strip."""


@dataclass(frozen=True, slots=True)
class WorkList:
    """A step's work, the same for all layers."""

    num_rows: int
    items: Packed
    """[num_items, ITEM_FIELDS], in the order of the line."""
    starts: Packed
    """[num_programs + 1]: the items of program p are `[starts[p], starts[p + 1])`."""
    strips: Packed
    """[num_strips + 1, STRIP_FIELDS]; the last one only ends the one before."""
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
        return (self.items, self.starts, self.strips, self.entries, self.row_tiles, self.pairs)


@dataclass(frozen=True, slots=True)
class _Segments:
    """A plan's segments and spans as arrays."""

    row_start: Ints
    row_end: Ints
    num_keys: Ints
    causal_rows: Ints
    first_span: Ints  # [num_segments + 1]
    span_slot: Ints
    span_key: Ints  # the segment's key that the span starts with
    span_length: Ints


@dataclass(frozen=True, slots=True)
class _Runs:
    """Adjacent slots that rows `[low, high)` of a tile read; of a causal run, key i from row low + i on."""

    tile: Ints
    slot: Ints
    length: Ints
    low: Ints
    high: Ints
    is_causal: Ints

    def __getitem__(self, index: object) -> _Runs:
        return _Runs(*(getattr(self, name)[index] for name in self.__slots__))


class PlanArrays:
    """A plan as arrays, from which work lists of several tilings can be made."""

    def __init__(self, plan: Plan) -> None:
        self.num_rows = plan.num_rows
        self._segments = _segments(plan)

    def cut_rows(self, tile_rows: int) -> Ints:
        """First rows of tiles of at most `tile_rows` rows, and the number of rows: [num_tiles + 1]."""
        num_tiles = -(-self.num_rows // tile_rows)
        slack = num_tiles * tile_rows - self.num_rows
        if num_tiles < 2 or not slack or num_tiles > MAX_ALIGNED_TILES:
            return np.minimum(np.arange(num_tiles + 1) * tile_rows, self.num_rows)
        straddling = self._straddling()
        bounds = [0]
        for left in range(num_tiles - 1, 0, -1):
            low, high = max(bounds[-1] + 1, self.num_rows - left * tile_rows), bounds[-1] + tile_rows
            # the last of the cheapest: argmin finds the first
            bounds.append(high - int(straddling[high : low - 1 : -1].argmin()))
        return np.array([*bounds, self.num_rows])

    def keys_read(self, bounds: Ints) -> int:
        """How many keys all tiles read together: what is shared by two tiles counts twice."""
        segments = self._segments
        first = np.searchsorted(bounds, segments.row_start, side="right")
        last = np.searchsorted(bounds, segments.row_end, side="left")
        return int((segments.num_keys * (last - first + 1)).sum())

    def work(self, tiling: Tiling, bounds: Ints) -> WorkList:
        """The work list of a tiling, rows cut at `bounds`."""
        runs = _by_tile(_runs(self._segments, bounds))
        is_strip = (runs.is_causal == 0) & (runs.length >= tiling.min_strip_blocks * tiling.block_keys)
        strips, rest = _split_strips(runs, is_strip, tiling.block_keys)
        num_tiles = len(bounds) - 1
        strip_bounds = _bounds(np.bincount(strips.tile, strips.length // tiling.block_keys, num_tiles))
        entries, gather_bounds = _entries(rest, num_tiles, tiling)
        line = _Line(tiling, bounds, strip_bounds, gather_bounds)
        strip_starts = _bounds(strips.length // tiling.block_keys)
        return WorkList(
            num_rows=self.num_rows,
            items=line.items(strip_starts),
            starts=line.starts,
            strips=_strips(strips, strip_starts),
            entries=entries,
            row_tiles=np.repeat(np.arange(num_tiles, dtype=np.int32), np.diff(bounds)),
            pairs=line.pairs(),
            num_partials=line.num_partials,
        )

    def _straddling(self) -> Ints:
        """Keys read on both sides of a cut before each row: [num_rows + 1]."""
        segments = self._segments
        change = np.bincount(segments.row_start + 1, segments.num_keys, self.num_rows + 2)
        change -= np.bincount(segments.row_end, segments.num_keys, self.num_rows + 2)
        return change.cumsum()[: self.num_rows + 1].astype(np.int64)


def build(plan: Plan, tiling: Tiling) -> WorkList:
    """The work list of a plan."""
    arrays = PlanArrays(plan)
    return arrays.work(tiling, arrays.cut_rows(tiling.tile_rows))


def _segments(plan: Plan) -> _Segments:
    segments = plan.segments
    fields = np.fromiter(
        chain.from_iterable(
            (seg.row_start, seg.row_end, seg.num_keys, seg.causal_rows, len(seg.spans)) for seg in segments
        ),
        np.int64,
    ).reshape(-1, 5)
    spans = np.fromiter(
        chain.from_iterable(chain.from_iterable(segment.spans for segment in segments)), np.int64
    ).reshape(-1, 2)
    first_span = _bounds(fields[:, 4])
    length = spans[:, 1] - spans[:, 0]
    before = np.cumsum(length) - length
    span_key = before - np.repeat(before[np.minimum(first_span[:-1], max(len(before) - 1, 0))], fields[:, 4])
    return _Segments(
        row_start=fields[:, 0],
        row_end=fields[:, 1],
        num_keys=fields[:, 2],
        causal_rows=fields[:, 3],
        first_span=first_span,
        span_slot=spans[:, 0],
        span_key=span_key,
        span_length=length,
    )


def _bounds(counts: NDArray[np.generic]) -> Ints:
    """`[0, c0, c0 + c1, ...]`."""
    bounds = np.zeros(len(counts) + 1, np.int64)
    bounds[1:] = np.cumsum(counts)
    return bounds


def _ranges(counts: Ints) -> Ints:
    """`0..c0-1, 0..c1-1, ...`."""
    bounds = _bounds(counts)
    return np.arange(bounds[-1]) - np.repeat(bounds[:-1], counts)


def _runs(segments: _Segments, bounds: Ints) -> _Runs:
    """What each tile reads of each segment: keys that all of its rows see, then those that only later rows see."""
    first_tile = np.searchsorted(bounds, segments.row_start, side="right") - 1
    num_tiles = np.searchsorted(bounds, segments.row_end, side="left") - first_tile
    seg = np.repeat(np.arange(len(num_tiles)), num_tiles)
    tile = first_tile[seg] + _ranges(num_tiles)
    row_start, num_keys, causal = segments.row_start[seg], segments.num_keys[seg], segments.causal_rows[seg]
    base = bounds[tile]
    first_row, last_row = np.maximum(base, row_start), np.minimum(bounds[tile + 1], segments.row_end[seg])
    before = num_keys - causal + 1  # what the segment's first row sees
    seen_by_all = np.minimum(before + first_row - row_start, num_keys)
    seen_by_last = np.minimum(before + last_row - 1 - row_start, num_keys)
    low, high = first_row - base, last_row - base
    runs = _spans(segments, seg, _Runs(tile, np.zeros_like(tile), seen_by_all, low, high, np.zeros_like(tile)))
    chunks = np.flatnonzero(seen_by_last > seen_by_all)
    if not len(chunks):
        return runs
    later = _Runs(tile, seen_by_all, seen_by_last, low + 1, high, np.ones_like(tile))[chunks]
    tails = _spans(segments, seg[chunks], later)
    return _Runs(*(np.concatenate((getattr(runs, name), getattr(tails, name))) for name in _Runs.__slots__))


def _spans(segments: _Segments, seg: Ints, parts: _Runs) -> _Runs:
    """Cut parts, whose slot and length are their first and last key in the segment, at the ends of its spans."""
    counts = np.diff(segments.first_span)[seg]
    part = np.repeat(np.arange(len(seg)), counts)
    span = segments.first_span[seg][part] + _ranges(counts)
    key = segments.span_key[span]
    first = np.maximum(parts.slot[part], key)
    length = np.minimum(parts.length[part], key + segments.span_length[span]) - first
    kept = np.flatnonzero(length > 0)
    part, span, first = part[kept], span[kept], first[kept]
    is_causal = parts.is_causal[part]
    return _Runs(
        tile=parts.tile[part],
        slot=segments.span_slot[span] + first - segments.span_key[span],
        length=length[kept],
        low=parts.low[part] + is_causal * (first - parts.slot[part]),
        high=parts.high[part],
        is_causal=is_causal,
    )


def _by_tile(runs: _Runs) -> _Runs:
    return runs[np.argsort(runs.tile, kind="stable")]


def _split_strips(runs: _Runs, is_strip: NDArray[np.bool_], block_keys: int) -> tuple[_Runs, _Runs]:
    """Whole blocks of the long runs; the short runs and the long ones' remainders, both ordered by tile."""
    if not is_strip.any():
        return runs[:0], runs
    whole = np.where(is_strip, runs.length // block_keys * block_keys, 0)
    strips = _Runs(runs.tile, runs.slot, whole, runs.low, runs.high, runs.is_causal)[is_strip]
    rest = _Runs(runs.tile, runs.slot + whole, runs.length - whole, runs.low, runs.high, runs.is_causal)
    return strips, rest[rest.length > 0]


def _strips(strips: _Runs, starts: Ints) -> Packed:
    packed = np.zeros((len(starts), STRIP_FIELDS), np.int32)
    packed[:, 0] = starts
    packed[:-1, 1], packed[:-1, 2], packed[:-1, 3] = strips.slot, strips.low, strips.high
    return packed


def _entries(runs: _Runs, num_tiles: int, tiling: Tiling) -> tuple[Packed, Ints]:
    """Entries of all tiles, filled up to whole blocks with empty ones; each tile's first block, [num_tiles + 1]."""
    size, per_block = tiling.entry_keys, tiling.block_keys // tiling.entry_keys
    counts = -(-runs.length // size)
    run = np.repeat(np.arange(len(counts)), counts)
    offset = _ranges(counts) * size
    per_tile = np.bincount(runs.tile, counts, num_tiles).astype(np.int64)
    blocks = _bounds(-(-per_tile // per_block))
    tile = runs.tile[run]
    place = np.arange(len(run)) + (blocks[:-1] * per_block - _bounds(per_tile)[:-1])[tile]
    num_keys = np.minimum(runs.length[run] - offset, size)
    packed = np.zeros((blocks[-1] * per_block, ENTRY_FIELDS), np.int32)
    if len(run):  # what fills the last block of a tile repeats a key that is there: the line's first will do
        packed[:, 0] = runs.slot[0] * size
    packed[place, 0] = (runs.slot[run] + offset) * size + num_keys - 1
    packed[place, 1] = _readers(runs, run, offset, num_keys)
    return packed, blocks


def _readers(runs: _Runs, run: Ints, offset: Ints, num_keys: Ints) -> Ints:
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
        self._pair_starts = _bounds(np.repeat(np.diff(strip_bounds) + np.diff(gather_bounds), heads))
        total = int(self._pair_starts[-1])
        shares = max(1, min(tiling.num_programs, total // tiling.min_share))
        cuts = np.arange(shares + 1) * total // shares
        self._item_starts = np.unique(np.concatenate((cuts, self._pair_starts)))
        self._pair = np.searchsorted(self._pair_starts, self._item_starts[:-1], side="right") - 1
        self._per_pair = np.bincount(self._pair, minlength=len(self._pair_starts) - 1)
        is_partial = self._per_pair[self._pair] > 1
        self.num_partials = int(is_partial.sum())
        self._partial = np.where(is_partial, np.cumsum(is_partial) - 1, -1)
        self.starts = np.full(tiling.num_programs + 1, len(self._pair), np.int32)
        self.starts[: shares + 1] = np.searchsorted(self._item_starts, cuts)

    def items(self, strip_starts: Ints) -> Packed:
        """[num_items, ITEM_FIELDS]; `strip_starts` [num_strips + 1] is each strip's first block of all strips'."""
        tile = self._pair // self._heads
        first = self._item_starts[:-1] - self._pair_starts[self._pair]
        last = self._item_starts[1:] - self._pair_starts[self._pair]
        strip_base, num_strip_blocks = self._strips[tile], np.diff(self._strips)[tile]
        first_block, last_block = (strip_base + np.minimum(at, num_strip_blocks) for at in (first, last))
        gather_base = self._gathers[tile]
        items = np.zeros((len(tile), ITEM_FIELDS), np.int32)
        items[:, 0] = self._bounds[tile]
        items[:, 1] = np.diff(self._bounds)[tile]
        items[:, 2] = self._pair % self._heads
        items[:, 3] = np.searchsorted(strip_starts, first_block, side="right") - 1
        items[:, 4] = np.where(
            first_block < last_block, np.searchsorted(strip_starts, last_block, side="left"), items[:, 3]
        )
        items[:, 5], items[:, 6] = first_block, last_block
        items[:, 7] = gather_base + np.maximum(first - num_strip_blocks, 0)
        items[:, 8] = gather_base + np.maximum(last - num_strip_blocks, 0)
        items[:, 9] = self._partial
        return items

    def pairs(self) -> Packed:
        """[num_pairs, PAIR_FIELDS]."""
        pairs = np.zeros((len(self._per_pair), PAIR_FIELDS), np.int32)
        first_item = _bounds(self._per_pair)[:-1]
        pairs[:, 0] = self._partial[np.minimum(first_item, len(self._partial) - 1)] if len(self._partial) else 0
        pairs[:, 1] = self._per_pair
        pairs[:, 2] = np.repeat(self._bounds[:-1], self._heads)
        return pairs
