"""From a plan to FlashInfer's page tables: arrays of numbers, without torch. A page is what we call a block.

FlashInfer knows requests, not trees: consecutive rows whose last one reads every key of a path, and each row before it
one key less. So a chunk that attends to itself is a request, and every other row is one of its own:

    rows                       requests         pages of the path, in order
    0..3   a chunk of c        0  rows 0..3     trunk 1 2 3 | c's 7 8
    4      a's token           1  row  4        trunk 1 2 3 | a's 5
    5      b's token           2  row  5        trunk 1 2   | b's 6        b copied block 3 before it wrote there

Position p of a path always lies at offset p % block_size of its block, and a block that a node begins within holds what
comes before the node as well, shared or copied (`KVTree.place`). So the page that covers a stretch of positions is the
block of the last of them, and all pages but the last are full.

For a cascade the pages that adjacent requests begin with become an entry of their own, level by level; the last level
holds for each request what is left:

    level 0    rows 0..5: 1 2
    level 1    rows 0..4: 3               row 5: nothing
    level 2    rows 0..3: 7 8             row 4: 5             row 5: 6
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dendrite.engine.batch import Plan, Segment

Pages: TypeAlias = npt.NDArray[np.int32]
NOTHING: Pages = np.empty(0, np.int32)
MAX_LEVELS = 4
"""Levels of a cascade, at most: each is a kernel over all rows and a merge. What branches deeper is read row by row."""


@dataclass(frozen=True, slots=True)
class Request:
    """Consecutive rows on one path: row i of them reads the first `num_keys - num_rows + 1 + i` keys."""

    row_start: int
    num_rows: int
    pages: Pages  # [num_pages]
    num_keys: int

    def num_whole(self, block_size: int) -> int:
        """Leading pages that every row reads to their end."""
        return (self.num_keys - self.num_rows) // block_size


@dataclass(frozen=True, slots=True)
class PageTable:
    """What a FlashInfer wrapper plans with, all int32."""

    qo_indptr: Pages
    """[num_entries + 1], each entry's first row."""
    kv_indptr: Pages
    """[num_entries + 1], where each entry's pages begin in `kv_indices`."""
    kv_indices: Pages
    """[num_pages]"""
    last_page_len: Pages
    """[num_entries], keys in the last page; 0 without pages."""


_Entry: TypeAlias = tuple[int, Pages, int]
"""(number of rows, pages, keys in the last of them)"""


def row_bounds(plan: Plan) -> list[int]:
    """The requests' first rows, and the number of rows: [num_requests + 1]."""
    chunks = {segment.row_start: segment.causal_rows for segment in plan.segments if segment.causal_rows}
    bounds = [0]
    while bounds[-1] < plan.num_rows:
        bounds.append(bounds[-1] + chunks.get(bounds[-1], 1))
    return bounds


def requests_of(plan: Plan, block_size: int) -> list[Request]:
    """The requests of a plan, in row order."""
    bounds = row_bounds(plan)
    paths: list[list[Segment]] = [[] for _ in bounds[1:]]
    for segment in plan.segments:
        for index in range(bisect_left(bounds, segment.row_start), bisect_left(bounds, segment.row_end)):
            paths[index].append(segment)
    return [
        Request(first, last - first, _pages(path, block_size), sum(segment.num_keys for segment in path))
        for first, last, path in zip(bounds, bounds[1:], paths, strict=False)
    ]


def page_table(requests: Sequence[Request], block_size: int) -> PageTable:
    """Every request reads its whole path."""
    return _table(_rest(request, 0, block_size) for request in requests)


def cascade_tables(requests: Sequence[Request], block_size: int, *, max_levels: int = MAX_LEVELS) -> list[PageTable]:
    """Shared whole pages, level by level, then what is left; every level has all rows, and the last level all requests.

    Levels before the last are read to their end by every row; in the last one, rows of a request part as in `Request`.
    """
    whole = [request.num_whole(block_size) for request in requests]
    groups = [(0, len(requests))]
    done = [0] * len(requests)
    tables: list[PageTable] = []
    while len(tables) < max_levels - 1:
        groups = [run for group in groups for run in _runs(requests, group, whole, done)]
        entries = [_shared(requests[first:last], whole[first:last], done[first]) for first, last in groups]
        if not any(len(pages) for _, pages in entries):
            break
        for (first, last), (_, pages) in zip(groups, entries, strict=True):
            done[first:last] = [done[first] + len(pages)] * (last - first)
        tables.append(_table((rows, pages, block_size if len(pages) else 0) for rows, pages in _joined(entries)))
    tables.append(_table(_rest(request, taken, block_size) for request, taken in zip(requests, done, strict=True)))
    return tables


def _pages(path: Iterable[Segment], block_size: int) -> Pages:
    """The page of every stretch of `block_size` positions of a path."""
    pieces = [NOTHING]
    position = 0
    for segment in path:
        for first, last in segment.spans:
            assert first % block_size == position % block_size, "a path's keys lie at their positions' offsets"
            if position % block_size:
                pieces[-1] = pieces[-1][:-1]  # this span's block holds what that page held of the path
            pieces.append(np.arange(first // block_size, (last - 1) // block_size + 1, dtype=np.int32))
            position += last - first
    return np.concatenate(pieces)


def _rest(request: Request, taken: int, block_size: int) -> _Entry:
    """A request's pages behind the first `taken`: one at least, since those are read to their end."""
    return request.num_rows, request.pages[taken:], request.num_keys - (len(request.pages) - 1) * block_size


def _runs(
    requests: Sequence[Request], group: tuple[int, int], whole: Sequence[int], done: Sequence[int]
) -> Iterable[tuple[int, int]]:
    """Cuts a group of requests where the next page differs or may not be shared."""
    first, end = group
    while first < end:
        at, last = done[first], first + 1
        if whole[first] > at:
            page = requests[first].pages[at]
            while last < end and whole[last] > at and requests[last].pages[at] == page:
                last += 1
        yield first, last
        first = last


def _shared(run: Sequence[Request], whole: Sequence[int], at: int) -> tuple[int, Pages]:
    """A run's rows, and the pages from number `at` on that all its requests share; none for a request alone."""
    num_rows = sum(request.num_rows for request in run)
    if len(run) == 1:
        return num_rows, NOTHING
    pages = run[0].pages[at : min(whole)]
    for request in run[1:]:
        differs = pages != request.pages[at : at + len(pages)]
        if differs.any():
            pages = pages[: int(differs.argmax())]
    return num_rows, pages


def _joined(entries: Iterable[tuple[int, Pages]]) -> list[tuple[int, Pages]]:
    """Adjacent entries without pages as one."""
    joined: list[tuple[int, Pages]] = []
    for num_rows, pages in entries:
        if joined and not len(pages) and not len(joined[-1][1]):
            joined[-1] = (joined[-1][0] + num_rows, NOTHING)
        else:
            joined.append((num_rows, pages))
    return joined


def _table(entries: Iterable[_Entry]) -> PageTable:
    rows, pages, last_page_len = zip(*entries, strict=True)
    return PageTable(
        _indptr(rows), _indptr(map(len, pages)), np.concatenate(pages), np.array(last_page_len, dtype=np.int32)
    )


def _indptr(counts: Iterable[int]) -> Pages:
    return np.cumsum([0, *counts], dtype=np.int32)
