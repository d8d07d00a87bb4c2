"""FlashInfer's attention over views of the pool: paged prefill, paged decode, and its cascade.

    pool    [2, num_kv_heads, num_slots, head_dim]                                  of a layer
    pages   K and V, each [num_blocks, num_kv_heads, block_size, head_dim]          strided views of it, nothing copied

FlashInfer plans on the host and keeps a plan's arrays in pinned memory until the device has copied them, and it does
not wait for that before it plans again. So there are two of each wrapper, in turn: step k+1 is planned while step k
runs, and what is waited for is the copy of step k-1, which is there by then.

The first plan of a process loads the kernels, the first of a machine compiles them, for a minute or so. Nothing here is
captured in a graph: a wrapper that can be captured is made for one number of requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.attention.page_tables import PageTable, Request, cascade_tables, page_table, requests_of
from dendrite.engine.batch import Plan
from dendrite.engine.errors import ModelError
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec

if TYPE_CHECKING:
    from flashinfer import (
        BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper,
        MultiLevelCascadeAttentionWrapper,
    )

Form = Literal["prefill", "decode", "cascade"]
Kernels = Literal["auto", "fa2", "fa3"]
PagedKV: TypeAlias = tuple[Tensor, Tensor]
"""K and V of a layer, each [num_blocks, num_kv_heads, block_size, head_dim]."""
HEAD_DIMS = (64, 128)
DTYPES = ("float16", "bfloat16")
LAYOUT = "HND"
"""FlashInfer's name for pages whose heads come before their slots."""
TILE_LANES = 128
"""Query heads times rows of FlashInfer's largest tile."""
LEAST_WORKSPACE = 16 << 20


class FlashInferAttention(AttentionBackend):
    """One of FlashInfer's wrappers: chunks and rows that each read their path, or levels of shared pages."""

    def __init__(self, pool: KVPool, spec: ModelSpec, *, form: Form = "prefill", kernels: Kernels = "auto") -> None:
        """Make the wrappers.

        Args:
            pool: what is read.
            spec: the model's dimensions.
            form: "prefill" takes every plan; "decode" those without chunks; "cascade" reads shared pages once.
            kernels: FlashInfer's backend for prefill; "auto" is the one it thinks the fastest for the device.

        Raises:
            ModelError: FlashInfer's kernels are not made for this.
        """
        super().__init__(pool, spec)
        if (reason := why_unsupported(pool, spec)) is not None:
            raise ModelError(reason)
        self._pages = [_paged(layer, pool.block_size) for layer in pool.layers]
        workspace = torch.zeros(_workspace_bytes(pool, spec), dtype=torch.uint8, device=pool.data.device)
        self._turns = [_wrapped(form, kernels, pool, spec, workspace) for _ in range(2)]
        self._copied = [torch.cuda.Event(), torch.cuda.Event()]
        self._turn = 0

    def prepare(self, plan: Plan) -> None:
        """Plan on the host; what the device needs of it is copied behind the steps in flight."""
        requests = requests_of(plan, self.pool.block_size)
        self._turn ^= 1
        self._copied[self._turn].synchronize()  # of the plan two steps ago
        self._turns[self._turn].plan(requests)
        self._copied[self._turn].record()

    def run(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attend; see `AttentionBackend.run`. Exactly the planned rows."""
        if query.stride(2) != 1:
            query = query.contiguous()
        return self._turns[self._turn].run(query, self._pages[layer], scale)


def why_unsupported(pool: KVPool, spec: ModelSpec) -> str | None:
    """Why FlashInfer's kernels cannot run a model of these dimensions over this pool; None if they can."""
    if pool.data.device.type != "cuda":
        return "FlashInfer needs a CUDA device"
    if spec.dtype not in DTYPES or spec.head_dim not in HEAD_DIMS:
        return f"FlashInfer is used for heads of {HEAD_DIMS} numbers in half precision"
    if pool.layers[0].stride(1) >= 1 << 32:
        return "FlashInfer keeps strides in 32 bits: give a smaller kv_memory"
    return None


class _Wrapped(Protocol):
    """A wrapper of FlashInfer's with what this model gives it."""

    def plan(self, requests: Sequence[Request]) -> None:
        """Take the next step's requests."""

    def run(self, query: Tensor, pages: PagedKV, scale: float) -> Tensor:
        """Attend over a layer."""


class _Shape:
    """What every wrapper is told of the model."""

    def __init__(self, pool: KVPool, spec: ModelSpec) -> None:
        self.block_size = pool.block_size
        self.head_dim = spec.head_dim
        self.dimensions = (spec.num_heads, spec.num_kv_heads, spec.head_dim, pool.block_size)
        self.dtypes = {"q_data_type": pool.data.dtype, "kv_data_type": pool.data.dtype}


class _Prefill:
    """Chunks and single rows side by side; the scale comes as a factor of the query's, with each run."""

    def __init__(self, wrapper: BatchPrefillWithPagedKVCacheWrapper, shape: _Shape) -> None:
        self._wrapper = wrapper
        self._shape = shape

    def plan(self, requests: Sequence[Request]) -> None:
        table = _pinned(page_table(requests, self._shape.block_size))
        self._wrapper.plan(*table, *self._shape.dimensions, causal=True, sm_scale=1.0, **self._shape.dtypes)

    def run(self, query: Tensor, pages: PagedKV, scale: float) -> Tensor:
        output = query.new_empty(query.shape)
        self._wrapper.run(query, pages, q_scale=scale, out=output)
        return output


class _Decode:
    """Single rows only."""

    def __init__(self, wrapper: BatchDecodeWithPagedKVCacheWrapper, shape: _Shape) -> None:
        self._wrapper = wrapper
        self._shape = shape

    def plan(self, requests: Sequence[Request]) -> None:
        assert all(request.num_rows == 1 for request in requests), "the decode form takes no chunks"
        _, *table = _pinned(page_table(requests, self._shape.block_size))
        self._wrapper.plan(*table, *self._shape.dimensions, sm_scale=1.0, **self._shape.dtypes)

    def run(self, query: Tensor, pages: PagedKV, scale: float) -> Tensor:
        output = query.new_empty(query.shape)
        self._wrapper.run(query, pages, q_scale=scale, out=output)
        return output


class _Cascade:
    """Levels, each a kernel over all rows. The scale is part of the plan, so the first run with another plans again."""

    def __init__(self, workspace: Tensor, shape: _Shape) -> None:
        self._workspace = workspace
        self._shape = shape
        self._scale = 1 / math.sqrt(shape.head_dim)  # a model's own, as a rule
        self._tables: list[tuple[Tensor, ...]] = []
        self._wrappers: dict[int, MultiLevelCascadeAttentionWrapper] = {}
        """By number of levels, which is a wrapper's for good."""

    def plan(self, requests: Sequence[Request]) -> None:
        self._tables = [_pinned(table) for table in cascade_tables(requests, self._shape.block_size)]
        self._plan()

    def run(self, query: Tensor, pages: PagedKV, scale: float) -> Tensor:
        if scale != self._scale:
            self._scale = scale
            torch.cuda.current_stream(query.device).synchronize()  # FlashInfer writes over what it may still copy
            self._plan()
        output: Tensor = self._wrappers[len(self._tables)].run(query, pages)
        return output

    def _plan(self) -> None:
        from flashinfer import MultiLevelCascadeAttentionWrapper  # noqa: PLC0415, there on some machines only

        num_levels = len(self._tables)
        if num_levels not in self._wrappers:
            self._wrappers[num_levels] = MultiLevelCascadeAttentionWrapper(num_levels, self._workspace, LAYOUT)
        self._wrappers[num_levels].plan(
            *map(list, zip(*self._tables, strict=True)),
            *self._shape.dimensions,
            causal=True,
            sm_scale=self._scale,
            **self._shape.dtypes,
        )


def _wrapped(form: Form, kernels: Kernels, pool: KVPool, spec: ModelSpec, workspace: Tensor) -> _Wrapped:
    import flashinfer  # noqa: PLC0415, there on some machines only

    shape = _Shape(pool, spec)
    if form == "decode":
        return _Decode(flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, LAYOUT, use_tensor_cores=True), shape)
    if form == "cascade":
        return _Cascade(workspace, shape)
    return _Prefill(flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, LAYOUT, backend=kernels), shape)


def _paged(layer: Tensor, block_size: int) -> PagedKV:
    keys, values = layer.unflatten(2, (-1, block_size)).transpose(1, 2)
    return keys, values


def _pinned(table: PageTable) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A table's arrays in one piece of pinned memory, which PyTorch does not hand out again before it is copied."""
    arrays = (table.qo_indptr, table.kv_indptr, table.kv_indices, table.last_page_len)
    sizes = [len(array) for array in arrays]
    pinned = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=True)
    qo_indptr, kv_indptr, kv_indices, last_page_len = parts = pinned.split(sizes)
    for part, array in zip(parts, arrays, strict=True):
        part.numpy()[:] = array
    return qo_indptr, kv_indptr, kv_indices, last_page_len


def _workspace_bytes(pool: KVPool, spec: ModelSpec) -> int:
    """Room for the partial results of FlashInfer's kernels for all GPUs, which cut work for two programs a processor.

    Each K/V head has its share of the programs, and a program a tile for each of the head's query heads.
    """
    num_processors = torch.cuda.get_device_properties(pool.data.device).multi_processor_count
    group = spec.num_heads // spec.num_kv_heads
    return LEAST_WORKSPACE + 2 * num_processors * group * TILE_LANES * (spec.head_dim + 1) * 4
