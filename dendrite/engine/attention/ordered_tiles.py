"""Cuts a plan for attention whose order of additions depends on positions alone. No torch here.

A row's keys lie in columns by their absolute position, and what is added up first is a group of `GROUP` positions that
begins at a multiple of `GROUP`. A tile reads whole groups that all its rows share once, its *trunk*; the rest, its
*tail*, is read once for all rows where they lie on one path, and else copied for each row:

    columns  0 ......... 63 | 64 ........ 127 | 128 ...........
    row 0    system           system            system  a  a1            trunk [0, 128), tails of three rows
    row 1    system           system            system  a  a2            `lengths` says where each row ends
    row 2    system           system            system  b

So who shares what, and where a tile ends, decides what is read once and never what is added to what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dendrite.engine.attention.tiles import CHUNK_ROWS, MAX_SCORES, row_ranges
from dendrite.engine.batch import Plan, Segment

Ints = NDArray[np.int64]
Spans = tuple[tuple[int, int], ...]

GROUP = 64
"""Positions whose weighted values are added up by one matrix product; the groups' sums are added in order."""
TILE_COST = 4000
"""What a tile of its own costs, in copied keys."""


@dataclass(frozen=True, slots=True)
class OrderedTile:
    """A range of rows, attended at once."""

    row_start: int
    row_end: int
    trunk: Spans
    """Slot ranges of whole groups, from position 0 on, that all rows read."""
    num_trunk: int
    """Keys of the trunk."""
    tails: tuple[Ints, ...]
    """Slots behind the trunk: one array that all rows read, or one for each row."""
    lengths: tuple[int, ...]
    """How many keys each row reads."""


def ordered_tiles(plan: Plan, *, num_heads: int) -> list[OrderedTile]:
    """Cut `plan` into tiles that cover all its rows, in order."""
    segments = sorted(plan.segments, key=lambda seg: (seg.row_start - seg.row_end, seg.causal_rows > 0))  # from root on
    most = max(1, MAX_SCORES // num_heads)
    ranges = row_ranges(plan.num_rows, segments, most)
    return [_tile(start, end, segments) for part in ranges for start, end in _parted(*part, segments)]


def _parted(start: int, end: int, segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Cut rows where some of them share so much that reading it once is worth a tile of its own."""
    done: list[tuple[int, int]] = []
    open_ranges = [(start, end)]
    while open_ranges:
        start, end = open_ranges.pop()
        inside = [(max(seg.row_start, start), min(seg.row_end, end), seg) for seg in segments]
        partial = [
            (last - first, first, last, seg)
            for first, last, seg in inside
            if last > first and (first, last) != (start, end)
        ]
        num_rows, first, last, seg = max(partial, key=lambda each: each[0] * each[3].num_keys, default=(0, 0, 0, None))
        if seg is None or num_rows * seg.num_keys < TILE_COST or (num_rows == 1 and seg.causal_rows < CHUNK_ROWS):
            done.append((start, end))
            continue
        bounds = sorted({start, first, last, end})
        open_ranges += list(pairwise(bounds))
    return sorted(done)


def _tile(start: int, end: int, segments: Sequence[Segment]) -> OrderedTile:
    inside = [seg for seg in segments if seg.row_start < end and start < seg.row_end]
    common = [seg for seg in inside if seg.row_start <= start and end <= seg.row_end]
    shared = [span for seg in common for span in seg.spans]
    num_shared = sum(seg.num_keys for seg in common)
    lengths = tuple(sum(_visible(seg, row) for seg in inside) for row in range(start, end))
    if len(common) == len(inside):
        num_read = max(lengths)
        num_trunk = num_read // GROUP * GROUP
        trunk, rest = _cut(shared, num_trunk)
        return OrderedTile(start, end, trunk, num_trunk, (_slots(rest)[: num_read - num_trunk],), lengths)
    num_trunk = num_shared // GROUP * GROUP
    trunk, rest = _cut(shared, num_trunk)
    tails = []
    for row, length in zip(range(start, end), lengths, strict=True):
        own = [span for seg in inside[len(common) :] if seg.row_start <= row < seg.row_end for span in seg.spans]
        tails.append(_slots([*rest, *own])[: length - num_trunk])
    return OrderedTile(start, end, trunk, num_trunk, tuple(tails), lengths)


def _visible(segment: Segment, row: int) -> int:
    """How many of the segment's keys `row` reads, by the definition in `Segment`."""
    if not segment.row_start <= row < segment.row_end:
        return 0
    return segment.num_keys - max(0, segment.causal_rows - 1 - (row - segment.row_start))


def _cut(spans: Sequence[tuple[int, int]], num_keys: int) -> tuple[Spans, list[tuple[int, int]]]:
    """The spans of the first `num_keys` keys, adjacent ones joined, and those of the rest."""
    first: list[tuple[int, int]] = []
    rest: list[tuple[int, int]] = []
    for low, high in spans:
        middle = min(high, low + num_keys)
        num_keys -= middle - low
        if low < middle and first and first[-1][1] == low:
            first[-1] = (first[-1][0], middle)
        elif low < middle:
            first.append((low, middle))
        if middle < high:
            rest.append((middle, high))
    return tuple(first), rest


def _slots(spans: Sequence[tuple[int, int]]) -> Ints:
    return np.concatenate([np.arange(first, last) for first, last in spans] or [np.empty(0, np.int64)])
