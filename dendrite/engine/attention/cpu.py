"""Tree attention for the CPU: each shared segment is read once for all the rows under it.

Here a plan becomes views and index tensors, once a step, because each costs time in every layer; `cpu_tiles` says what
is computed on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.attention.cpu_tiles import GatherViews, RunViews, TileViews, attend
from dendrite.engine.attention.tiles import Run, Tile, tiles
from dendrite.engine.batch import Plan
from dendrite.engine.compiled import compiled
from dendrite.engine.ids import TRASH_BLOCK
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec

MIN_JOINED = 128
"""Keys that a run's stretches have to have on average to be joined one by one; shorter ones are gathered by slot."""


class TreeAttention(AttentionBackend):
    """Runs a plan tile by tile."""

    def __init__(self, pool: KVPool, spec: ModelSpec) -> None:
        super().__init__(pool, spec)
        self._workspace = Workspace(pool.data.dtype)
        self._attend = compiled(attend)
        self.tiles: list[TileViews] = []
        """The plan as `cpu_tiles.attend` takes it."""

    def prepare(self, plan: Plan) -> None:
        """Cut the plan into tiles, choose forms, make index tensors, masks and buffers."""
        planned = tiles(plan, num_heads=self.spec.num_heads)
        self.tiles = [_tile_views(tile, self.pool, self.spec, self._workspace) for tile in planned]

    def run(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attend; see `AttentionBackend.run`."""
        return self._attend(self.tiles, self.pool.layers[layer], query, scale)


class Workspace:
    """Buffers that all tiles of a step share, since they run one after the other; they grow and never shrink."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor; the next `take` of the same name may return the same memory."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=self._dtype)
        return buffer[:size].view(shape)


def _tile_views(tile: Tile, pool: KVPool, spec: ModelSpec, workspace: Workspace) -> TileViews:
    index = _GatherIndex.of(tile, pool.block_size) if tile.gathered else None
    heads = (spec.num_kv_heads, tile.row_end - tile.row_start, spec.num_heads // spec.num_kv_heads)
    scores = (*heads, tile.width + (index.num_keys if index else 0))
    unused = _has_unused(tile, index, scores)
    views = TileViews(
        row_start=tile.row_start,
        row_end=tile.row_end,
        query=workspace.take("query", (*heads, spec.head_dim)),
        scores=_masked(scores, pool.data.dtype) if unused else workspace.take("scores", scores),
        weights=workspace.take("weights", scores),
        output=workspace.take("output", (*heads, spec.head_dim)),
        runs=[],
        gathered=None,
    )
    return views._replace(
        runs=[_run_views(run, column, views) for run, column in zip(tile.runs, tile.columns, strict=True)],
        gathered=_gather_views(index, tile, views, pool.block_size) if index else None,
    )


def _run_views(run: Run, column: int, tile: TileViews) -> RunViews:
    rows = slice(run.row_start - tile.row_start, run.row_end - tile.row_start)
    columns = slice(column, column + run.num_keys)
    num_heads, _, _, head_dim = tile.query.shape
    ceiling = _ceiling(run, tile.scores.dtype)
    limited = None
    if ceiling is not None:
        limited = tile.scores[:, rows, :, columns.stop - ceiling.shape[-1] : columns.stop]
    return RunViews(
        query=tile.query[:, rows].view(num_heads, -1, head_dim),
        scores=tile.scores[:, rows, :, columns].view(num_heads, -1, run.num_keys),
        weights=tile.weights[:, rows, :, columns].view(num_heads, -1, run.num_keys),
        output=tile.output[:, rows].view(num_heads, -1, head_dim),
        spans=list(run.spans),
        slots=_slots(run) if len(run.spans) > 1 and run.num_keys < MIN_JOINED * len(run.spans) else None,
        limited=limited,
        ceiling=ceiling,
    )


def _ceiling(run: Run, dtype: torch.dtype) -> Tensor | None:
    """The most that a score may be, for the keys that not every row reads: [num_rows, 1, num_such_keys].

    The least finite score hides a key, the greatest leaves its score as it is.
    """
    if not run.limits:
        return None
    keys, limits = torch.arange(min(run.limits), run.num_keys), torch.tensor(run.limits).view(-1, 1, 1)
    bounds = torch.finfo(dtype)
    return torch.full((len(run.limits), 1, len(keys)), bounds.max, dtype=dtype).masked_fill_(keys >= limits, bounds.min)


def _slots(run: Run) -> Tensor:
    return torch.cat([torch.arange(first, last) for first, last in run.spans])


@dataclass(frozen=True, slots=True)
class _GatherIndex:
    """Which blocks are copied for which row, and which of their keys the row does not read.

    row   blocks         keys (block_size 4)
    0     7  9           . . k k  k . . .        a segment may begin and end anywhere in a block
    1     8  -           k k k .  . . . .        rows are padded with the trash block to one length
    """

    row_start: int
    row_end: int
    num_keys: int
    """Per row, the padding included."""
    blocks: Tensor  # [num_rows * blocks per row], int64
    hidden: Tensor  # [num_rows, 1, num_keys], bool

    @classmethod
    def of(cls, tile: Tile, block_size: int) -> _GatherIndex:
        """Index every row from the first to the last that gathers."""
        row_start = min(run.row_start for run in tile.gathered)
        row_end = max(run.row_end for run in tile.gathered)
        blocks: list[list[int]] = [[] for _ in range(row_start, row_end)]
        visible: list[list[tuple[int, int]]] = [[] for _ in range(row_start, row_end)]  # ranges of a row's keys
        for run in tile.gathered:
            for row in range(run.row_start, run.row_end):
                _gather(run, run.visible(row), block_size, blocks[row - row_start], visible[row - row_start])
        length = max(map(len, blocks))
        hidden = np.ones((len(blocks), 1, length * block_size), dtype=np.bool_)
        for row, ranges in enumerate(visible):
            for first, last in ranges:
                hidden[row, 0, first:last] = False
        padded = [row_blocks + [TRASH_BLOCK] * (length - len(row_blocks)) for row_blocks in blocks]
        return cls(row_start, row_end, length * block_size, torch.tensor(padded).flatten(), torch.from_numpy(hidden))


def _gather(run: Run, num_keys: int, block_size: int, blocks: list[int], visible: list[tuple[int, int]]) -> None:
    """Append the blocks of the run's first `num_keys` keys, and where those keys lie among the row's."""
    for first, last in run.spans:
        end = min(last, first + num_keys)
        if first >= end:
            return
        num_keys -= end - first
        start = len(blocks) * block_size + first % block_size
        visible.append((start, start + end - first))
        blocks.extend(range(first // block_size, (end - 1) // block_size + 1))


def _has_unused(tile: Tile, index: _GatherIndex | None, shape: tuple[int, ...]) -> bool:
    """Whether the score matrix has cells that no part writes."""
    used = sum((run.row_end - run.row_start) * run.num_keys for run in tile.runs)
    gathered = (index.row_end - index.row_start) * index.num_keys if index else 0
    return used + gathered < shape[1] * shape[3]


def _masked(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A score matrix of the tile's own: cells that nothing writes stay masked through all layers."""
    return torch.full(shape, torch.finfo(dtype).min, dtype=dtype)


def _gather_views(index: _GatherIndex, tile: Tile, views: TileViews, block_size: int) -> GatherViews:
    rows = slice(index.row_start - tile.row_start, index.row_end - tile.row_start)
    dtype = views.scores.dtype
    return GatherViews(
        query=views.query[:, rows],
        scores=views.scores[:, rows, :, tile.width :],
        weights=views.weights[:, rows, :, tile.width :],
        output=views.output[:, rows],
        blocks=index.blocks,
        block_size=block_size,
        hidden=index.hidden,
        hidden_keys=index.hidden.flatten().nonzero().flatten(),
        least=torch.tensor(torch.finfo(dtype).min, dtype=dtype),
        zero=torch.zeros((1, 1, 1), dtype=dtype),
    )
