"""Cuts a plan into tiles of rows, and each tile's keys into the two forms that the CPU runs. No torch here.

    plan                                     one tile, rows 0..3
    system [0, 512)  rows 0..3               columns 0 .......... 511 | 512 .... 543
    a      [0, 28)   rows 0..2               row 0   system           | a, a1
    a1, a2, b        one row each            row 1   system           | a, a2
                                             row 2   system           | b
                                                     run (read once)    gathered (each row its own copy)

A *run* is read once for all its rows, as one matrix product. Short segments are *gathered*: every row's are copied
side by side and padded to one length, because a product per segment would cost more than the copies. All of a row's
scores lie in one line of a score matrix, so that one softmax serves the tile and nothing has to be merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dendrite.engine.batch import Plan, Segment

CHUNK_ROWS = 16
"""Causal rows from which a chunk gets tiles of its own: its path's length differs from that of rows beside it."""
MAX_SCORES = 1 << 21
"""Scores that a tile may have over all heads: 4 MB in bfloat16, which the last cache holds."""
MAX_WASTE = 1.5
"""How much wider than its rows' average path a tile may be."""
RUN_COST = 1000
"""What the calls for one run cost, in gathered keys: about 30 microseconds against 0.03 for a key's copies."""
GATHER_COST = 1500
"""What the calls for gathering cost at all, in gathered keys."""
MIN_COPIES = 128
"""Copies below which reading a run once is not even tried."""
FEW_RUNS = 4
"""So few runs that each form is tried for all."""


@dataclass(frozen=True, slots=True)
class Run:
    """Keys that a range of a tile's rows reads together."""

    spans: tuple[tuple[int, int], ...]
    """Slot ranges `[first, last)` in key order, no two adjacent."""
    num_keys: int
    row_start: int
    row_end: int
    limits: tuple[int, ...] = ()
    """How many keys each row reads, where not all rows read all of them."""

    def visible(self, row: int) -> int:
        """How many of the run's keys `row` reads."""
        return self.limits[row - self.row_start] if self.limits else self.num_keys


@dataclass(frozen=True, slots=True)
class Tile:
    """A range of rows, attended at once."""

    row_start: int
    row_end: int
    runs: tuple[Run, ...]
    """What is read once for all its rows."""
    columns: tuple[int, ...]
    """Each run's first column in the score matrix; runs of different rows may share columns."""
    width: int
    """Columns that the runs take; the gathered keys come after them."""
    gathered: tuple[Run, ...]
    """What is copied for each row that reads it, one after the other."""


def tiles(plan: Plan, *, num_heads: int) -> list[Tile]:
    """Cut `plan` into tiles that cover all its rows, in order."""
    merged = _merged(plan.segments)
    ranges = row_ranges(plan.num_rows, merged, max(1, MAX_SCORES // num_heads))
    return [_tile(start, end, _clipped(merged, start, end)) for start, end in ranges]


def _merged(segments: Iterable[Segment]) -> list[Segment]:
    """Segments that the same rows read become one, the causal one last, so that its rows' limits stay right."""
    groups: dict[tuple[int, int], list[Segment]] = {}
    alone: list[Segment] = []
    for segment in segments:
        group = groups.setdefault((segment.row_start, segment.row_end), [])
        if segment.causal_rows and any(other.causal_rows for other in group):
            alone.append(segment)
        else:
            group.append(segment)
    return [_joined(group) for group in groups.values()] + alone


def _joined(group: list[Segment]) -> Segment:
    if len(group) == 1:
        return group[0]
    ordered = sorted(group, key=lambda segment: segment.causal_rows)
    return Segment(
        spans=tuple(span for segment in ordered for span in segment.spans),
        num_keys=sum(segment.num_keys for segment in ordered),
        row_start=ordered[0].row_start,
        row_end=ordered[0].row_end,
        causal_rows=ordered[-1].causal_rows,
    )


def row_ranges(num_rows: int, segments: Sequence[Segment], max_scores: int) -> list[tuple[int, int]]:
    """Row ranges of similar path lengths whose scores, rows times the longest path, stay within `max_scores`."""
    lengths = _path_lengths(num_rows, segments)
    cuts = {num_rows}
    for segment in segments:
        if segment.causal_rows >= CHUNK_ROWS:
            cuts.update((segment.row_start, segment.row_start + segment.causal_rows))
    ranges = []
    start, longest, total = 0, 0, 0
    for row, length in enumerate(lengths):
        longest, total, count = max(longest, length), total + length, row - start + 1
        too_large = longest * count > max_scores or longest * count > MAX_WASTE * total + RUN_COST
        if row > start and (row in cuts or too_large):
            ranges.append((start, row))
            start, longest, total = row, length, length
    return [*ranges, (start, num_rows)] if num_rows else []


def _path_lengths(num_rows: int, segments: Sequence[Segment]) -> list[int]:
    """How many keys each row reads, a chunk's own limits left out."""
    changes = [0] * (num_rows + 1)
    for segment in segments:
        changes[segment.row_start] += segment.num_keys
        changes[segment.row_end] -= segment.num_keys
    lengths, length = [], 0
    for change in changes[:-1]:
        length += change
        lengths.append(length)
    return lengths


def _clipped(segments: Sequence[Segment], start: int, end: int) -> list[Run]:
    """What rows `[start, end)` read of each segment."""
    return [
        _clip(segment, max(start, segment.row_start), min(end, segment.row_end))
        for segment in segments
        if segment.row_start < end and start < segment.row_end
    ]


def _clip(segment: Segment, start: int, end: int) -> Run:
    before = segment.num_keys - segment.causal_rows
    first, last = start - segment.row_start, end - segment.row_start
    num_keys = before + min(last, segment.causal_rows)
    limits: tuple[int, ...] = ()
    if before + first + 1 < num_keys:
        limits = tuple(min(before + index + 1, num_keys) for index in range(first, last))
    return Run(_first_keys(segment.spans, num_keys), num_keys, start, end, limits)


def _first_keys(spans: tuple[tuple[int, int], ...], num_keys: int) -> tuple[tuple[int, int], ...]:
    """The spans of the first `num_keys` keys, adjacent ones joined."""
    kept: list[tuple[int, int]] = []
    for first, last in spans:
        end = min(last, first + num_keys)
        num_keys -= end - first
        if kept and kept[-1][1] == first:
            kept[-1] = (kept[-1][0], end)
        elif first < end:
            kept.append((first, end))
    return tuple(kept)


def _tile(start: int, end: int, runs: list[Run]) -> Tile:
    """Choose each run's form and place the read-once ones in the score matrix."""
    whole, gathered = _forms(start, end, runs)
    free = [0] * (end - start)  # each row's first free column
    columns = []
    for run in whole:
        rows = slice(run.row_start - start, run.row_end - start)
        column = max(free[rows])
        columns.append(column)
        free[rows] = [column + run.num_keys] * (run.row_end - run.row_start)
    return Tile(start, end, tuple(whole), tuple(columns), max(free), tuple(gathered))


def _forms(start: int, end: int, runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """The cost model: split a tile's runs into (read once, gathered) as costs least.

    The more copies a run would take, the sooner it is read once, so only the number of the largest ones is open. Runs
    of few copies are not tried, unless there are so few runs that gathering could be avoided altogether.
    """
    ordered = sorted(runs, key=_num_copies, reverse=True)
    lengths = [0] * (end - start)  # gathered keys of each row
    for run in ordered:
        _lengthen(lengths, run, start, run.num_keys)
    best, best_cost = 0, _gather_cost(lengths)
    for count, run in enumerate(ordered, start=1):
        if _num_copies(run) < MIN_COPIES and len(ordered) > FEW_RUNS:
            break
        _lengthen(lengths, run, start, -run.num_keys)
        cost = count * RUN_COST + _gather_cost(lengths)
        if cost < best_cost:
            best, best_cost = count, cost
    return ordered[:best], ordered[best:]


def _num_copies(run: Run) -> int:
    return run.num_keys * (run.row_end - run.row_start)


def _lengthen(lengths: list[int], run: Run, start: int, num_keys: int) -> None:
    for row in range(run.row_start - start, run.row_end - start):
        lengths[row] += num_keys


def _gather_cost(lengths: list[int]) -> int:
    """In keys: every row from the first to the last that gathers is padded to the longest."""
    rows = [row for row, length in enumerate(lengths) if length]
    return GATHER_COST + (rows[-1] + 1 - rows[0]) * max(lengths) if rows else 0
