"""Tree attention for the CPU: each shared segment is read once for all the rows under it.

A tile's rows hold all their scores in one matrix whose columns are the keys of its runs, then those gathered for each
row; `tiles` draws it. One softmax over it replaces partial results and their merging. Cells that belong to no key of
their row hold the least finite score, so that their weight is exactly zero, and what unwritten slots hold never
reaches a result: not even a NaN, which a zero weight would not silence.

Matrix products go through `bmm`: oneDNN runs it at twice the speed of PyTorch's flash kernel for the CPU. In bfloat16
scores are rounded as in Transformers' eager attention, which costs no accuracy that shows in the logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.attention.tiles import Run, Tile, tiles
from dendrite.engine.batch import Plan
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
        self._tiles: list[_PreparedTile] = []

    def prepare(self, plan: Plan) -> None:
        """Cut the plan into tiles, choose forms, make index tensors, masks and buffers."""
        planned = tiles(plan, num_heads=self.spec.num_heads)
        self._tiles = [_PreparedTile(tile, self.pool, self.spec, self._workspace) for tile in planned]

    def run(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attend; see `AttentionBackend.run`."""
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for tile in self._tiles:
            tile.run(layer, query, scale, output)
        return output


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


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What a tile's parts read and write; `group` is the query heads of one K/V head."""

    query: Tensor  # [num_kv_heads, num_rows, group, head_dim]
    scores: Tensor  # [num_kv_heads, num_rows, group, width]
    weights: Tensor  # [num_kv_heads, num_rows, group, width]
    output: Tensor  # [num_kv_heads, num_rows, group, head_dim]


class _Part(ABC):
    """Some of a tile's keys: columns of its score matrix."""

    @abstractmethod
    def score(self, pool: KVPool, layer: int, scale: float) -> Tensor:
        """Write the part's scores; its values of this layer, for `accumulate`."""

    @abstractmethod
    def accumulate(self, values: Tensor) -> None:
        """Add the part's weighted values to the output."""


class _PreparedTile:
    """One tile's buffers and parts. Views are made here, once a step, because each costs time in every layer."""

    def __init__(self, tile: Tile, pool: KVPool, spec: ModelSpec, workspace: Workspace) -> None:
        self._rows = slice(tile.row_start, tile.row_end)
        self._pool = pool
        index = _GatherIndex.of(tile, pool.block_size) if tile.gathered else None
        heads = (spec.num_kv_heads, tile.row_end - tile.row_start, spec.num_heads // spec.num_kv_heads)
        scores = (*heads, tile.width + (index.num_keys if index else 0))
        unused = _has_unused(tile, index, scores)
        self._buffers = buffers = _Buffers(
            query=workspace.take("query", (*heads, spec.head_dim)),
            scores=_masked(scores, pool.data.dtype) if unused else workspace.take("scores", scores),
            weights=workspace.take("weights", scores),
            output=workspace.take("output", (*heads, spec.head_dim)),
        )
        self._parts: list[_Part] = [
            _RunPart(run, column, tile.row_start, buffers) for run, column in zip(tile.runs, tile.columns, strict=True)
        ]
        if index:
            self._parts.append(_GatherPart(index, tile, buffers))

    def run(self, layer: int, query: Tensor, scale: float, output: Tensor) -> None:
        """Attend the tile's rows of `query` [num_rows, num_heads, head_dim] into the same rows of `output`."""
        buffers = self._buffers
        heads = (buffers.query.shape[0], buffers.query.shape[2])
        buffers.query.copy_(query[self._rows].unflatten(1, heads).transpose(0, 1))
        values = [part.score(self._pool, layer, scale) for part in self._parts]
        torch.softmax(buffers.scores, -1, out=buffers.weights)
        buffers.output.zero_()
        for part, part_values in zip(self._parts, values, strict=True):
            part.accumulate(part_values)
        output[self._rows].unflatten(1, heads).transpose(0, 1).copy_(buffers.output)


class _RunPart(_Part):
    """Keys read once: one matrix product for all rows under them."""

    def __init__(self, run: Run, column: int, row_start: int, buffers: _Buffers) -> None:
        rows = slice(run.row_start - row_start, run.row_end - row_start)
        columns = slice(column, column + run.num_keys)
        num_heads = buffers.query.shape[0]
        self._query = buffers.query[:, rows].view(num_heads, -1, buffers.query.shape[-1])
        self._scores = buffers.scores[:, rows, :, columns].view(num_heads, -1, run.num_keys)
        self._weights = buffers.weights[:, rows, :, columns].view(num_heads, -1, run.num_keys)
        self._output = buffers.output[:, rows].view(num_heads, -1, buffers.output.shape[-1])
        self._spans = [slice(*span) for span in run.spans]
        self._slots = _slots(run) if len(run.spans) > 1 and run.num_keys < MIN_JOINED * len(run.spans) else None
        self._ceiling = _ceiling(run, buffers.scores.dtype)
        if self._ceiling is not None:
            first = column + run.num_keys - self._ceiling.shape[-1]
            self._limited = buffers.scores[:, rows, :, first : column + run.num_keys]

    def score(self, pool: KVPool, layer: int, scale: float) -> Tensor:
        """See `_Part.score`."""
        keys, values = self._load(pool.layers[layer])
        if keys.dtype is not torch.float32:
            # oneDNN's 16-bit product takes a transposed matrix only when it is contiguous; PyTorch would copy it
            # element by element.
            keys = keys.contiguous()
        torch.baddbmm(self._scores, self._query, keys.mT, beta=0, alpha=scale, out=self._scores)
        if self._ceiling is not None:
            torch.minimum(self._limited, self._ceiling, out=self._limited)
        return values

    def accumulate(self, values: Tensor) -> None:
        """See `_Part.accumulate`."""
        self._output.baddbmm_(self._weights, values)

    def _load(self, keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
        # [2, num_kv_heads, num_slots, head_dim] -> two of [num_kv_heads, num_keys, head_dim]
        if self._slots is not None:
            found = keys_and_values.index_select(2, self._slots)
        elif len(self._spans) > 1:
            found = torch.cat([keys_and_values[:, :, span] for span in self._spans], 2)
        else:
            found = keys_and_values[:, :, self._spans[0]]
        keys, values = found.unbind()
        return keys, values


def _ceiling(run: Run, dtype: torch.dtype) -> Tensor | None:
    """The most that a score may be, for the keys that not every row reads: [num_rows, 1, num_such_keys].

    The least finite score hides a key, the greatest leaves its score as it is. A minimum takes a third of the time of a
    masked fill.
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


class _GatherPart(_Part):
    """Keys copied side by side for each row: one batched product of small matrices."""

    def __init__(self, index: _GatherIndex, tile: Tile, buffers: _Buffers) -> None:
        rows = slice(index.row_start - tile.row_start, index.row_end - tile.row_start)
        self._index = index
        self._query = buffers.query[:, rows]
        self._scores = buffers.scores[:, rows, :, tile.width :]
        self._weights = buffers.weights[:, rows, :, tile.width :]
        self._output = buffers.output[:, rows]
        self._hidden_keys = index.hidden.flatten().nonzero().flatten()
        self._least = torch.tensor(torch.finfo(buffers.scores.dtype).min, dtype=buffers.scores.dtype)
        self._zero = torch.zeros((1, 1, 1), dtype=buffers.scores.dtype)

    def score(self, pool: KVPool, layer: int, scale: float) -> Tensor:
        """See `_Part.score`."""
        num_heads, num_rows, group, head_dim = self._query.shape
        gathered = pool.layer_blocks[layer].index_select(2, self._index.blocks)
        keys, values = gathered.view(2, num_heads, -1, head_dim).unbind()
        values.index_fill_(1, self._hidden_keys, 0)
        query = self._query.reshape(-1, group, head_dim)
        keys = keys.view(num_heads * num_rows, -1, head_dim)
        scores = torch.baddbmm(self._zero, query, keys.mT, beta=0, alpha=scale)
        torch.where(self._index.hidden, self._least, scores.view(self._scores.shape), out=self._scores)
        return values.view_as(keys)

    def accumulate(self, values: Tensor) -> None:
        """See `_Part.accumulate`."""
        weights = self._weights.reshape(values.shape[0], -1, self._index.num_keys)
        self._output.add_(torch.bmm(weights, values).view(self._output.shape))
