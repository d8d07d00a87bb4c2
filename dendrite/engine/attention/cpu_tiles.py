"""What the CPU computes for a tile in every layer; `cpu` prepares the views that it works on.

A tile's rows hold all their scores in one matrix whose columns are the keys of its runs, then those gathered for each
row; `tiles` draws it. One softmax over it replaces partial results and their merging. Cells that belong to no key of
their row hold the least finite score, so that their weight is exactly zero, and what unwritten slots hold never
reaches a result: not even a NaN, which a zero weight would not silence.

Matrix products go through `bmm`: oneDNN runs it at twice the speed of PyTorch's flash kernel for the CPU. In bfloat16
scores are rounded as in Transformers' eager attention, which costs no accuracy that shows in the logits.
"""

# Annotations are evaluated: functions of this module are compiled.
from typing import NamedTuple

import torch
from torch import Tensor


class RunViews(NamedTuple):
    """Keys read once, as one matrix product for all rows under them: `num_rows * group` queries of each K/V head."""

    query: Tensor  # [num_kv_heads, num_rows * group, head_dim]
    scores: Tensor  # [num_kv_heads, num_rows * group, num_keys]
    weights: Tensor  # likewise
    output: Tensor  # [num_kv_heads, num_rows * group, head_dim]
    spans: list[tuple[int, int]]
    """Where the keys are, `[first, last)`."""
    slots: Tensor | None
    """The same as [num_keys], where they are copied slot by slot."""
    limited: Tensor | None
    """The scores of keys that not every row reads, [num_kv_heads, num_rows, group, num_such_keys], and ..."""
    ceiling: Tensor | None
    """... the most that each may be, [num_rows, 1, num_such_keys]: the least finite number hides a key. A minimum takes
    a third of the time of a masked fill."""


class GatherViews(NamedTuple):
    """Keys copied side by side for each row: one batched product of small matrices."""

    query: Tensor  # [num_kv_heads, num_rows, group, head_dim]
    scores: Tensor  # [num_kv_heads, num_rows, group, num_keys]
    weights: Tensor  # likewise
    output: Tensor  # [num_kv_heads, num_rows, group, head_dim]
    blocks: Tensor  # [num_rows * blocks per row], int64
    block_size: int
    hidden: Tensor  # [num_rows, 1, num_keys], bool: keys that the row does not read
    hidden_keys: Tensor  # where that is so, among [num_rows * num_keys]
    least: Tensor  # the least finite score
    zero: Tensor  # [1, 1, 1]


class TileViews(NamedTuple):
    """A range of rows, attended at once; `group` is the query heads of one K/V head."""

    row_start: int
    row_end: int
    query: Tensor  # [num_kv_heads, num_rows, group, head_dim]
    scores: Tensor  # [num_kv_heads, num_rows, group, width]
    weights: Tensor  # likewise
    output: Tensor  # [num_kv_heads, num_rows, group, head_dim]
    runs: list[RunViews]
    gathered: GatherViews | None


def attend(tiles: list[TileViews], stored: Tensor, query: Tensor, scale: float) -> Tensor:
    """One layer's attention.

    Args:
        tiles: all rows, in order.
        stored: [2, num_kv_heads, num_slots, head_dim], the layer's K/V.
        query: [num_rows, num_heads, head_dim].
        scale: what scores are multiplied by.

    Returns:
        [num_rows, num_heads, head_dim].
    """
    output = torch.empty(query.shape, dtype=query.dtype)
    grouped = (query.shape[0], stored.shape[1], -1, query.shape[2])
    queries, outputs = query.unflatten(1, grouped[1:3]).transpose(0, 1), output.view(grouped).transpose(0, 1)
    for tile in tiles:
        tile.query.copy_(queries[:, tile.row_start : tile.row_end])
        _attend_tile(tile, stored, scale)
        outputs[:, tile.row_start : tile.row_end].copy_(tile.output)
    return output


def _attend_tile(tile: TileViews, stored: Tensor, scale: float) -> None:
    values = [_score_run(run, stored, scale) for run in tile.runs]
    gathered = tile.gathered
    if gathered is not None:
        values.append(_score_gathered(gathered, stored, scale))
    torch.softmax(tile.scores, -1, out=tile.weights)
    tile.output.zero_()
    for index, run in enumerate(tile.runs):
        run.output.baddbmm_(run.weights, values[index])
    if gathered is not None:
        _add_gathered(gathered, values[-1])


def _score_run(run: RunViews, stored: Tensor, scale: float) -> Tensor:
    # writes the scores; returns the values, [num_kv_heads, num_keys, head_dim]
    keys, values = _load(run, stored)
    if keys.dtype != torch.float32:
        # oneDNN's 16-bit product takes a transposed matrix only when it is contiguous; PyTorch would copy it element
        # by element.
        keys = keys.contiguous()
    torch.baddbmm(run.scores, run.query, keys.mT, beta=0, alpha=scale, out=run.scores)
    limited, ceiling = run.limited, run.ceiling
    if limited is not None and ceiling is not None:
        torch.minimum(limited, ceiling, out=limited)
    return values


def _load(run: RunViews, stored: Tensor) -> tuple[Tensor, Tensor]:
    # two of [num_kv_heads, num_keys, head_dim]
    slots = run.slots
    if slots is not None:
        found = stored.index_select(2, slots)
    elif len(run.spans) > 1:
        found = torch.cat([stored[:, :, first:last] for first, last in run.spans], 2)
    else:
        first, last = run.spans[0]
        found = stored[:, :, first:last]
    return found[0], found[1]


def _score_gathered(part: GatherViews, stored: Tensor, scale: float) -> Tensor:
    # writes the scores; returns the values, [num_kv_heads * num_rows, num_keys, head_dim]
    num_heads, num_rows, group, head_dim = part.query.shape
    found = stored.view(2, num_heads, -1, part.block_size * head_dim).index_select(2, part.blocks)
    keys, values = found.view(2, num_heads, -1, head_dim).unbind()
    values.index_fill_(1, part.hidden_keys, 0)
    keys = keys.view(num_heads * num_rows, -1, head_dim)
    query = part.query.reshape(-1, group, head_dim)
    scores = torch.baddbmm(part.zero, query, keys.mT, beta=0, alpha=scale)
    torch.where(part.hidden, part.least, scores.view(part.scores.shape), out=part.scores)
    return values.view(keys.shape)


def _add_gathered(part: GatherViews, values: Tensor) -> None:
    weights = part.weights.reshape(values.shape[0], -1, values.shape[1])
    part.output.add_(torch.bmm(weights, values).view(part.output.shape))
