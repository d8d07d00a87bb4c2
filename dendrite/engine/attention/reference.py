"""Attention as it is defined: each row gathers its whole path and attends in float32. Slow, readable, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.batch import Plan, Segment
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec


class ReferenceAttention(AttentionBackend):
    """What every other back end must agree with."""

    def __init__(self, pool: KVPool, spec: ModelSpec) -> None:
        super().__init__(pool, spec)
        self._row_slots: list[Tensor] = []

    def prepare(self, plan: Plan) -> None:
        """List each row's slots, from the root to itself."""
        device = self.pool.data.device
        self._row_slots = [torch.tensor(_path(plan, row), device=device) for row in range(plan.num_rows)]

    def run(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attend row by row; see `AttentionBackend.run`."""
        keys_and_values = self.pool.layers[layer]
        rows = [
            _attend(query[row], keys_and_values.index_select(2, slots), scale)
            for row, slots in enumerate(self._row_slots)
        ]
        return torch.stack(rows).to(query.dtype)


def _path(plan: Plan, row: int) -> list[int]:
    return [slot for segment in plan.segments for slot in _visible(segment, row)]


def _visible(segment: Segment, row: int) -> list[int]:
    """The segment's slots that `row` reads, by the definition in `Segment`."""
    if not segment.row_start <= row < segment.row_end:
        return []
    slots = [slot for first, last in segment.spans for slot in range(first, last)]
    index = row - segment.row_start
    return slots[: segment.num_keys - segment.causal_rows + index + 1] if index < segment.causal_rows else slots


def _attend(query: Tensor, keys_and_values: Tensor, scale: float) -> Tensor:
    # query [num_heads, head_dim]; keys_and_values [2, num_kv_heads, num_keys, head_dim]; result [num_heads, head_dim]
    keys, values = keys_and_values.float().unbind()
    grouped = query.float().unflatten(0, (keys.shape[0], -1))
    weights = torch.softmax(grouped @ keys.transpose(1, 2) * scale, dim=-1)
    return (weights @ values).flatten(0, 1)
