"""What tiles of rows read, as arrays: a plan's segments and spans cut at the tiles' rows.

A tile reads of a segment one run for each span: first the keys that all of its rows see, then, in a chunk that attends
to itself, the keys that only its later rows see.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from dendrite.engine.batch import Plan

Ints = NDArray[np.int64]
MAX_ALIGNED_TILES = 64
"""So many tiles are cut where few keys are read on both sides; more are cut at equal lengths, to stay quick."""


@dataclass(frozen=True, slots=True)
class Segments:
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
class Runs:
    """Adjacent slots that rows `[low, high)` of a tile read; of a causal run, key i from row low + i on."""

    tile: Ints
    slot: Ints
    length: Ints
    low: Ints
    high: Ints
    is_causal: Ints

    def __getitem__(self, index: object) -> Runs:
        return Runs(*(getattr(self, name)[index] for name in self.__slots__))


def segments_of(plan: Plan) -> Segments:
    """A plan's segments as arrays."""
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
    first_span = bounds_of(fields[:, 4])
    length = spans[:, 1] - spans[:, 0]
    before = length.cumsum() - length
    span_key = before - np.repeat(before[np.minimum(first_span[:-1], max(len(before) - 1, 0))], fields[:, 4])
    return Segments(
        row_start=fields[:, 0],
        row_end=fields[:, 1],
        num_keys=fields[:, 2],
        causal_rows=fields[:, 3],
        first_span=first_span,
        span_slot=spans[:, 0],
        span_key=span_key,
        span_length=length,
    )


def bounds_of(counts: NDArray[np.generic]) -> Ints:
    """`[0, c0, c0 + c1, ...]`."""
    bounds = np.zeros(len(counts) + 1, np.int64)
    counts.cumsum(out=bounds[1:])
    return bounds


def steps_of(bounds: Ints) -> Ints:
    """`[b1 - b0, b2 - b1, ...]`; `np.diff` takes three times as long for as few."""
    return bounds[1:] - bounds[:-1]


def ranges_of(counts: Ints) -> Ints:
    """`0..c0-1, 0..c1-1, ...`."""
    bounds = bounds_of(counts)
    return np.arange(bounds[-1]) - bounds[:-1].repeat(counts)


def cut_rows(segments: Segments, num_rows: int, tile_rows: int) -> Ints:
    """First rows of tiles of at most `tile_rows` rows, and the number of rows: [num_tiles + 1]."""
    num_tiles = -(-num_rows // tile_rows)
    slack = num_tiles * tile_rows - num_rows
    if num_tiles < 2 or not slack or num_tiles > MAX_ALIGNED_TILES:
        return np.minimum(np.arange(num_tiles + 1) * tile_rows, num_rows)
    straddling = _straddling(segments, num_rows)
    bounds = [0]
    for left in range(num_tiles - 1, 0, -1):
        low, high = max(bounds[-1] + 1, num_rows - left * tile_rows), bounds[-1] + tile_rows
        # the last of the cheapest: argmin finds the first
        bounds.append(high - int(straddling[high : low - 1 : -1].argmin()))
    return np.array([*bounds, num_rows])


def _straddling(segments: Segments, num_rows: int) -> Ints:
    """Keys read on both sides of a cut before each row: [num_rows + 1]."""
    change = np.bincount(segments.row_start + 1, segments.num_keys, num_rows + 2)
    change -= np.bincount(segments.row_end, segments.num_keys, num_rows + 2)
    return change.cumsum()[: num_rows + 1].astype(np.int64)


def runs_of(segments: Segments, bounds: Ints) -> Runs:
    """What the tiles read, ordered by tile."""
    first_tile = np.searchsorted(bounds, segments.row_start, side="right") - 1
    num_tiles = np.searchsorted(bounds, segments.row_end, side="left") - first_tile
    seg = np.repeat(np.arange(len(num_tiles)), num_tiles)
    tile = first_tile[seg] + ranges_of(num_tiles)
    row_start, num_keys, causal = segments.row_start[seg], segments.num_keys[seg], segments.causal_rows[seg]
    base = bounds[tile]
    first_row, last_row = np.maximum(base, row_start), np.minimum(bounds[tile + 1], segments.row_end[seg])
    before = num_keys - causal + 1  # what the segment's first row sees
    seen_by_all = np.minimum(before + first_row - row_start, num_keys)
    seen_by_last = np.minimum(before + last_row - 1 - row_start, num_keys)
    low, high = first_row - base, last_row - base
    runs = _spans(segments, seg, Runs(tile, np.zeros_like(tile), seen_by_all, low, high, np.zeros_like(tile)))
    chunks = np.flatnonzero(seen_by_last > seen_by_all)
    if not len(chunks):
        return _by_tile(runs)
    later = Runs(tile, seen_by_all, seen_by_last, low + 1, high, np.ones_like(tile))[chunks]
    tails = _spans(segments, seg[chunks], later)
    return _by_tile(Runs(*(np.concatenate((getattr(runs, name), getattr(tails, name))) for name in Runs.__slots__)))


def _by_tile(runs: Runs) -> Runs:
    return runs[np.argsort(runs.tile, kind="stable")]


def _spans(segments: Segments, seg: Ints, parts: Runs) -> Runs:
    """Cut parts, whose slot and length are their first and last key in the segment, at the ends of its spans."""
    counts = steps_of(segments.first_span)[seg]
    part = np.repeat(np.arange(len(seg)), counts)
    span = segments.first_span[seg][part] + ranges_of(counts)
    key = segments.span_key[span]
    first = np.maximum(parts.slot[part], key)
    length = np.minimum(parts.length[part], key + segments.span_length[span]) - first
    kept = np.flatnonzero(length > 0)
    part, span, first = part[kept], span[kept], first[kept]
    is_causal = parts.is_causal[part]
    return Runs(
        tile=parts.tile[part],
        slot=segments.span_slot[span] + first - segments.span_key[span],
        length=length[kept],
        low=parts.low[part] + is_causal * (first - parts.slot[part]),
        high=parts.high[part],
        is_causal=is_causal,
    )
