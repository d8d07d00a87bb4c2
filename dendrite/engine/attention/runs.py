"""What tiles of rows read: a plan's spans cut at the tiles' rows.

A tile reads of a span one run: the keys that all of its rows see. Of a chunk that attends to itself it reads a second
one: the keys that only its later rows see.

Plans are short, so this is plain Python: a step of one row or eight is ready before twenty array operations are.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from dendrite.engine.batch import Plan, Segment

Run = tuple[int, int, int, int, int]
"""(slot, length, low, high, is_causal): rows `[low, high)` of the tile read `length` adjacent slots; of a causal run,
key i from row low + i on."""
MAX_ALIGNED_TILES = 64
"""So many tiles are cut where few keys are read on both sides; more are cut at equal lengths, to stay quick."""


def cut_rows(plan: Plan, tile_rows: int) -> list[int]:
    """First rows of tiles of at most `tile_rows` rows, and the number of rows: [num_tiles + 1]."""
    num_rows = plan.num_rows
    num_tiles = -(-num_rows // tile_rows)
    slack = num_tiles * tile_rows - num_rows
    if num_tiles < 2 or not slack or num_tiles > MAX_ALIGNED_TILES:
        return [*range(0, num_rows, tile_rows), num_rows]
    straddling = _straddling(plan)
    bounds = [0]
    for left in range(num_tiles - 1, 0, -1):
        low, high = max(bounds[-1] + 1, num_rows - left * tile_rows), bounds[-1] + tile_rows
        bounds.append(min(range(high, low - 1, -1), key=straddling.__getitem__))  # the last of the cheapest
    return [*bounds, num_rows]


def _straddling(plan: Plan) -> list[int]:
    """Keys read on both sides of a cut before each row: [num_rows + 1]."""
    change = [0] * (plan.num_rows + 2)
    for segment in plan.segments:
        change[segment.row_start + 1] += segment.num_keys
        change[segment.row_end] -= segment.num_keys
    return list(accumulate(change[:-1]))


def runs_of(plan: Plan, bounds: list[int]) -> list[list[Run]]:
    """What each tile reads; `bounds` as `cut_rows` gives them."""
    tiles: list[list[Run]] = [[] for _ in bounds[1:]]
    for segment in plan.segments:
        tile = bisect_right(bounds, segment.row_start) - 1
        while bounds[tile] < segment.row_end:
            base = bounds[tile]
            low, high = max(segment.row_start - base, 0), min(segment.row_end, bounds[tile + 1]) - base
            if segment.causal_rows:
                tiles[tile] += _runs_of_chunk(segment, base, low, high)
            else:
                tiles[tile] += [(first, last - first, low, high, 0) for first, last in segment.spans]
            tile += 1
    return tiles


def _runs_of_chunk(segment: Segment, base: int, low: int, high: int) -> list[Run]:
    """What rows `[low, high)` of the tile that begins with row `base` read of a segment that attends to itself."""
    runs: list[Run] = []
    num_seen = segment.num_keys - segment.causal_rows + 1 + base - segment.row_start  # keys seen, less the tile's row
    for first, last in segment.spans:
        length = last - first
        by_all = min(max(num_seen + low, 0), length)
        by_last = min(max(num_seen + high - 1, 0), length)
        if by_all:
            runs.append((first, by_all, low, high, 0))
        if by_last > by_all:
            runs.append((first + by_all, by_last - by_all, by_all - num_seen + 1, high, 1))
        num_seen -= length
    return runs
