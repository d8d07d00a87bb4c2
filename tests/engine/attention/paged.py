"""What FlashInfer computes from page tables, in plain PyTorch: the page tables' tests run anywhere with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.attention.page_tables import Pages, PageTable, cascade_tables, page_table, requests_of
from dendrite.engine.batch import Plan
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec


def reads(table: PageTable, block_size: int, *, causal: bool) -> list[Pages]:
    """The slots that each row reads, in order."""
    found: list[Pages] = []
    for entry, last_page_len in enumerate(table.last_page_len.tolist()):
        pages = table.kv_indices[table.kv_indptr[entry] : table.kv_indptr[entry + 1]]
        slots = np.array([np.arange(page * block_size, (page + 1) * block_size) for page in pages], np.int32).flatten()
        slots = slots[: len(slots) - block_size + last_page_len] if len(pages) else slots
        num_rows = int(table.qo_indptr[entry + 1] - table.qo_indptr[entry])
        found += [slots[: len(slots) - num_rows + 1 + row] if causal else slots for row in range(num_rows)]
    return found


class PagedAttention(AttentionBackend):
    """Attention level by level, merged by log-sum-exp; one level is FlashInfer's prefill, several are its cascade."""

    def __init__(self, pool: KVPool, spec: ModelSpec, *, max_levels: int) -> None:
        super().__init__(pool, spec)
        self._max_levels = max_levels
        self._levels: list[list[Pages]] = []

    def prepare(self, plan: Plan) -> None:
        size = self.pool.block_size
        requests = requests_of(plan, size)
        tables = cascade_tables(requests, size, max_levels=self._max_levels)
        if self._max_levels == 1:
            tables = [page_table(requests, size)]
        last = len(tables) - 1
        self._levels = [reads(table, size, causal=level == last) for level, table in enumerate(tables)]

    def run(self, layer: int, query: Tensor, scale: float) -> Tensor:
        outputs, lses = zip(*(self._level(layer, query, scale, rows) for rows in self._levels), strict=True)
        weights = torch.softmax(torch.stack(lses), 0).unsqueeze(-1)
        return (torch.stack(outputs) * weights).sum(0).to(query.dtype)

    def _level(self, layer: int, query: Tensor, scale: float, rows: list[Pages]) -> tuple[Tensor, Tensor]:
        assert len(rows) == len(query)
        output, lse = torch.zeros_like(query), torch.full(query.shape[:2], -torch.inf)
        group = self.spec.num_heads // self.spec.num_kv_heads
        for row, slots in enumerate(rows):
            if len(slots):
                keys, values = self.pool.layers[layer][:, :, slots].repeat_interleave(group, dim=1)
                scores = torch.einsum("hd,hkd->hk", query[row], keys) * scale
                output[row] = torch.einsum("hk,hkd->hd", torch.softmax(scores, -1), values)
                lse[row] = torch.logsumexp(scores, -1)
        return output, lse
