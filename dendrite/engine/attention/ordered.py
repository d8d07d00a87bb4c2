"""Attention for the CPU whose results are the same bits whatever else is in the step; `ordered_tiles` draws the idea.

Three things make a row's result depend on its own path alone:

- a score is one dot product over a head's width, by a matrix product of at least 4 rows (the smallest kernels add in
  another order) and a multiple of 16 keys;
- a row's scores lie in one line by position and are followed by masked ones, whose weights are exactly zero; the
  softmax adds up a line in lanes, which zeros at the end do not change;
- weighted values are added up group by group of positions, then the groups in order; groups behind the row's end add
  zeros.

`dendrite.engine.invariance` tests all of it on the machine at hand when a model is loaded.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.attention.cpu import MIN_JOINED, Workspace
from dendrite.engine.attention.ordered_tiles import GROUP, Ints, OrderedTile, Spans, ordered_tiles
from dendrite.engine.batch import Plan
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec

LANES = 4
"""Rows that a matrix product has at least where fewer would go to another kernel."""
SMALL = 400
"""Multiplications below which PyTorch does not ask the BLAS."""
STEP = 16
"""Keys are padded to a multiple of this."""
MIN_BLOCK = 8
"""Slots of a block from which blocks are copied whole; smaller ones are copied slot by slot."""


class OrderedAttention(AttentionBackend):
    """Runs a plan tile by tile, in an order of additions that positions decide."""

    def __init__(self, pool: KVPool, spec: ModelSpec) -> None:
        super().__init__(pool, spec)
        self._workspace = Workspace(pool.data.dtype)
        self._tiles: list[_PreparedTile] = []

    def prepare(self, plan: Plan) -> None:
        """Cut the plan into tiles, make index tensors, masks and buffers."""
        planned = ordered_tiles(plan, num_heads=self.spec.num_heads)
        self._tiles = [_PreparedTile(tile, self.pool, self.spec, self._workspace) for tile in planned]

    def run(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attend; see `AttentionBackend.run`."""
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for tile in self._tiles:
            tile.run(layer, query, scale, output)
        return output


class _PreparedTile:
    """One tile's buffers and parts; `lanes` is the query heads of one K/V head, padded.

    query    [num_kv_heads, num_rows, lanes, head_dim]
    scores   [num_kv_heads, num_rows, lanes, width]         weights alike
    sums     [num_kv_heads, num_groups, num_rows * lanes, head_dim]         one for each group of positions
    """

    def __init__(self, tile: OrderedTile, pool: KVPool, spec: ModelSpec, workspace: Workspace) -> None:
        self._pool = pool
        self._rows = slice(tile.row_start, tile.row_end)
        self._group = spec.num_heads // spec.num_kv_heads
        num_heads, num_rows, num_trunk = spec.num_kv_heads, len(tile.lengths), tile.num_trunk
        lanes = _lanes(self._group, spec.head_dim, pool.data.dtype)
        tail = _Tail(tile, pool) if max(tile.lengths) > num_trunk else None
        width = num_trunk + (tail.width if tail else 0)
        self._query = workspace.take("query", (num_heads, num_rows, lanes, spec.head_dim))
        self._query[:, :, self._group :] = 0
        self._scores = workspace.take("scores", (num_heads, num_rows, lanes, width))
        weights = workspace.take("weights", (num_heads, num_rows, lanes, width))
        self._weights = weights
        sums = workspace.take("sums", (num_heads, -(-width // GROUP), num_rows * lanes, spec.head_dim))
        self._sums = sums
        self._trunk = _Trunk(tile, self._query, self._scores, weights, sums) if num_trunk else None
        self._tail = tail
        if tail:
            tail.attach(num_trunk, self._query, self._scores, weights, sums)
        first = min(tile.lengths)
        self._limited = self._scores[..., first:]
        self._ceiling = _ceiling(tile.lengths, first, width, pool.data.dtype) if first < width else None

    def run(self, layer: int, query: Tensor, scale: float, output: Tensor) -> None:
        """Attend the tile's rows of `query` [num_rows, num_heads, head_dim] into the same rows of `output`."""
        num_heads = self._query.shape[0]
        own = query[self._rows].unflatten(1, (num_heads, self._group)).transpose(0, 1)
        self._query[:, :, : self._group].copy_(own)
        values = [
            (part, part.score(self._pool, layer, scale)) for part in (self._trunk, self._tail) if part is not None
        ]
        if self._ceiling is not None:
            torch.minimum(self._limited, self._ceiling, out=self._limited)
        torch.softmax(self._scores, -1, out=self._weights)
        for part, part_values in values:
            part.add_up(part_values)
        total = self._sums.sum(1).view(self._query.shape)
        output[self._rows].unflatten(1, (num_heads, self._group)).transpose(0, 1).copy_(total[:, :, : self._group])


def _lanes(group: int, head_dim: int, dtype: torch.dtype) -> int:
    is_steady = dtype is not torch.float32 and group * STEP * head_dim >= SMALL
    return group if is_steady else -(-group // LANES) * LANES


def _ceiling(lengths: tuple[int, ...], first: int, width: int, dtype: torch.dtype) -> Tensor:
    """The most that a score may be in columns `[first, width)`: [num_rows, 1, num_columns].

    The least finite score hides a key, the greatest leaves its score as it is.
    """
    bounds = torch.finfo(dtype)
    hidden = torch.arange(first, width) >= torch.tensor(lengths).view(-1, 1, 1)
    return torch.full(hidden.shape, bounds.max, dtype=dtype).masked_fill_(hidden, bounds.min)


class _Trunk:
    """Whole groups that are read once for all rows."""

    def __init__(self, tile: OrderedTile, query: Tensor, scores: Tensor, weights: Tensor, sums: Tensor) -> None:
        num_heads, num_keys = query.shape[0], tile.num_trunk
        self._query = query.view(num_heads, -1, query.shape[-1])
        self._scores = scores.view(num_heads, -1, scores.shape[-1])[..., :num_keys]
        num_groups = num_keys // GROUP
        grouped = weights.view(num_heads, -1, weights.shape[-1])[..., :num_keys].unflatten(2, (num_groups, GROUP))
        self._weights = list(grouped.transpose(1, 2))  # of each head [num_groups, num_rows * lanes, GROUP]
        self._sums = list(sums[:, :num_groups])
        self._spans = [slice(*span) for span in tile.trunk]
        self._slots = _joined_slots(tile.trunk, num_keys)

    def score(self, pool: KVPool, layer: int, scale: float) -> Tensor:
        """Write the scores; returns the values, for `add_up`."""
        keys, values = self._load(pool.layers[layer])
        if keys.dtype is not torch.float32:
            keys = keys.contiguous()  # else PyTorch copies its transpose element by element
        torch.baddbmm(self._scores, self._query, keys.mT, beta=0, alpha=scale, out=self._scores)
        return values

    def add_up(self, values: Tensor) -> None:
        """Write each group's weighted values."""
        for weights, own, sums in zip(self._weights, values, self._sums, strict=True):
            torch.bmm(weights, own.unflatten(0, (-1, GROUP)), out=sums)

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


def _joined_slots(spans: Spans, num_keys: int) -> Tensor | None:
    if len(spans) == 1 or num_keys >= MIN_JOINED * len(spans):
        return None
    return torch.cat([torch.arange(first, last) for first, last in spans])


class _Tail:
    """What comes behind the trunk, copied: once for rows of one path, else for each row.

    Blocks are copied whole where a row's keys lie in them as in its columns; slots that came along from elsewhere are
    then put right, and columns behind a path's end are filled with its last key, whose score is hidden.
    """

    def __init__(self, tile: OrderedTile, pool: KVPool) -> None:
        size = pool.block_size
        grain = size if MIN_BLOCK <= size <= GROUP and GROUP % size == 0 else 1
        step = max(STEP, grain)
        self.width = -(-max(map(len, tile.tails)) // step) * step
        fill = tile.trunk[-1][1] - 1 if tile.trunk else int(tile.tails[0][0])  # for rows that end with the trunk
        slots = np.stack([_padded(tail, self.width, fill) for tail in tile.tails])  # [num_paths, width]
        self._num_paths = len(slots)
        columns = np.arange(self.width) % grain
        blocks = slots[:, grain - 1 :: grain] // grain
        wrong = np.flatnonzero(slots != np.repeat(blocks * grain, grain, axis=1) + columns)
        self._by_block = grain > 1
        self._index = torch.from_numpy(blocks.flatten())
        self._wrong = torch.from_numpy(wrong) if len(wrong) else None
        self._right = torch.from_numpy(slots.flatten()[wrong])

    def attach(self, num_trunk: int, query: Tensor, scores: Tensor, weights: Tensor, sums: Tensor) -> None:
        """Take the tile's buffers; the tail's columns begin at `num_trunk`."""
        num_heads, num_rows, lanes, head_dim = query.shape
        self._heads = num_heads
        paths = num_heads * self._num_paths
        self._query = query.view(paths, -1, head_dim)
        rows = num_rows * lanes // self._num_paths
        self._scores = scores.view(num_heads, self._num_paths, rows, -1)[..., num_trunk:]
        own = weights.view(paths, rows, -1)[..., num_trunk:]
        first = num_trunk // GROUP
        self._groups = [
            (slice(low, low + GROUP), own[..., low : low + GROUP], sums[:, first + low // GROUP])
            for low in range(0, self.width, GROUP)
        ]

    def score(self, pool: KVPool, layer: int, scale: float) -> Tensor:
        """Write the scores; returns the values, for `add_up`."""
        stored = pool.layers[layer]
        source = pool.layer_blocks[layer] if self._by_block else stored
        found = source.index_select(2, self._index).view(2, self._heads, -1, stored.shape[-1])
        if self._wrong is not None:
            found.index_copy_(2, self._wrong, stored.index_select(2, self._right))
        keys, values = found.view(2, len(self._query), self.width, -1).unbind()
        scores = torch.baddbmm(_ZERO[keys.dtype], self._query, keys.mT, beta=0, alpha=scale)
        self._scores.copy_(scores.view(self._scores.shape))
        return values

    def add_up(self, values: Tensor) -> None:
        """Write each group's weighted values."""
        for columns, weights, sums in self._groups:
            sums.copy_(torch.bmm(weights, values[:, columns]).view(sums.shape))


_ZERO = {dtype: torch.zeros((1, 1, 1), dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def _padded(tail: Ints, width: int, fill: int) -> Ints:
    return np.concatenate([tail, np.full(width - len(tail), tail[-1] if len(tail) else fill)])
