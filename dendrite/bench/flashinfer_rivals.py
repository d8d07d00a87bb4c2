"""FlashInfer's paged attention over the same trees: flat decode, its cascade over stars, its prefill over prompts.

Decode and cascade read their K/V from pools in their own layout, with random contents: only their time is looked at.
Prefill is what the engine may run, over views of our pool.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from dendrite.bench.attention_trees import BLOCK_SIZE, Tree
from dendrite.engine.attention.flashinfer import FlashInferAttention, Kernels
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec

Make = Callable[[Tree, Tensor], Callable[[], Tensor] | None]
"""Plans a tree for a query [num_rows, num_heads, head_dim]: what runs it, None if the kernel cannot."""
WORKSPACE_BYTES = 512 << 20
HOPPER = (9, 0)
"""The compute capability that FlashInfer's fa3 kernels are made for."""


def rivals(pool: KVPool, spec: ModelSpec) -> tuple[dict[str, Make], list[str]]:
    """FlashInfer's kernels by name, and notes for the reader. They are compiled at their first use, for minutes."""
    if find_spec("flashinfer") is None:
        return {}, ["FlashInfer is not installed, so nothing stands beside (pip install flashinfer-python)"]
    layer = pool.layers[0]  # [2, num_kv_heads, num_slots, head_dim]
    pages = layer.unflatten(2, (-1, BLOCK_SIZE)).permute(2, 0, 3, 1, 4).contiguous()
    made: dict[str, Make] = {"flashinfer flat": _Flat(pages, spec), "flashinfer cascade": _Cascade(pages, spec)}
    made["flashinfer fa2"] = _Prefill(pool, spec, "fa2")
    if torch.cuda.get_device_capability() == HOPPER:
        made["flashinfer fa3"] = _Prefill(pool, spec, "fa3")
    return made, []


class _Flat:
    """Batch decode: every row reads its whole path."""

    def __init__(self, pages: Tensor, spec: ModelSpec) -> None:
        self._pages, self._spec = pages, spec  # [num_blocks, 2, BLOCK_SIZE, num_kv_heads, head_dim]

    def __call__(self, tree: Tree, query: Tensor) -> Callable[[], Tensor] | None:
        if tree.is_prompt:
            return None
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper  # noqa: PLC0415, there on some machines only

        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        paths = [tree.row_blocks(row) for row in range(tree.plan.num_rows)]
        wrapper.plan(
            _indptr([len(path) for path in paths]),
            torch.tensor([block for path in paths for block in path], dtype=torch.int32, device=query.device),
            torch.full((len(paths),), BLOCK_SIZE, dtype=torch.int32),
            self._spec.num_heads,
            self._spec.num_kv_heads,
            self._spec.head_dim,
            BLOCK_SIZE,
            q_data_type=query.dtype,
            kv_data_type=query.dtype,
        )
        output = torch.empty_like(query)
        return lambda: wrapper.run(query, self._pages, out=output)


class _Cascade:
    """Two levels: what all rows share, and what each has for itself."""

    def __init__(self, pages: Tensor, spec: ModelSpec) -> None:
        self._pages, self._spec = pages, spec

    def __call__(self, tree: Tree, query: Tensor) -> Callable[[], Tensor] | None:
        shared, *own = tree.plan.segments
        num_rows = tree.plan.num_rows
        if len(own) != num_rows or tree.is_prompt:
            return None
        from flashinfer import MultiLevelCascadeAttentionWrapper  # noqa: PLC0415, there on some machines only

        device = query.device
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        wrapper = MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
        num_shared = shared.num_keys // BLOCK_SIZE
        paths = [tree.row_blocks(row) for row in range(num_rows)]
        full = torch.full((num_rows,), BLOCK_SIZE, dtype=torch.int32, device=device)
        wrapper.plan(
            [_indptr([num_rows]).to(device), _indptr([1] * num_rows).to(device)],
            [_indptr([num_shared]).to(device), _indptr([len(path) - num_shared for path in paths]).to(device)],
            [
                torch.tensor(paths[0][:num_shared], dtype=torch.int32, device=device),
                torch.tensor(
                    [block for path in paths for block in path[num_shared:]], dtype=torch.int32, device=device
                ),
            ],
            [full[:1], full],
            self._spec.num_heads,
            self._spec.num_kv_heads,
            self._spec.head_dim,
            BLOCK_SIZE,
            q_data_type=query.dtype,
        )
        return lambda: wrapper.run(query, self._pages)


class _Prefill:
    """Batch prefill of one request."""

    def __init__(self, pool: KVPool, spec: ModelSpec, kernels: Kernels) -> None:
        self._pool, self._spec, self._kernels = pool, spec, kernels

    def __call__(self, tree: Tree, query: Tensor) -> Callable[[], Tensor] | None:
        if not tree.is_prompt:
            return None
        backend = FlashInferAttention(self._pool, self._spec, kernels=self._kernels)
        backend.prepare(tree.plan)
        return lambda: backend.run(0, query, 0.1)


def _indptr(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
