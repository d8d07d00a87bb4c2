"""Tree attention on CUDA: Triton kernels over a work list, fit for captured graphs.

`prepare` turns the plan into a work list in pinned memory and copies it, without waiting, into a static buffer on the
device. `run` launches two kernels on a fixed grid that read everything about the tree from that buffer. So a graph that
was captured with one plan replays with any other that fits the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton import next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.attention.tree_kernel import attend_items, merge_partials
from dendrite.engine.attention.worklist import Tiling, WorkList, build
from dendrite.engine.batch import Plan
from dendrite.engine.errors import ModelError
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec

HEAD_DIMS = (16, 32, 64, 128)
MAX_GROUP = 32
"""Query heads of a K/V head; more would leave tiles of a single row."""
CAPACITY = 1 << 18
"""Numbers of the static buffer: 1 MiB, enough for half a million gathered keys."""
ENTRY_KEYS = 8
"""Keys of an entry: short enough that single-token nodes waste little of a block."""
MERGE_WIDTH = 32
"""Partial results that are loaded at once."""
LOG2_E = 1.4426950408889634
INTERPRETER_PROCESSORS = 3
"""What the interpreter pretends to have: few, so that tests are quick, and more than one, so that work is cut."""


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """One compiled form of the kernel."""

    block_m: int
    """Rows times group of a tile."""
    block_n: int
    """Keys of a block."""
    num_warps: int
    num_stages: int
    programs_per_processor: int
    use_tiles: bool = True
    """Load whole blocks with the tensor memory accelerator."""


HALF_PRECISION = KernelConfig(64, 64, num_warps=4, num_stages=3, programs_per_processor=2)
FULL_PRECISION = KernelConfig(32, 32, num_warps=4, num_stages=2, programs_per_processor=2, use_tiles=False)


class TritonTreeAttention(AttentionBackend):
    """Every key of a tree is read once for each tile of the rows under it."""

    def __init__(self, pool: KVPool, spec: ModelSpec, *, config: KernelConfig | None = None) -> None:
        """Allocate the static buffers.

        Raises:
            ModelError: a head width or number of query heads that the kernels are not made for, or too large a pool.
        """
        super().__init__(pool, spec)
        if (reason := why_unsupported(spec)) is not None:
            raise ModelError(reason)
        if max(2 * spec.num_kv_heads, ENTRY_KEYS) * pool.layers[0].shape[2] >= 1 << 31:
            raise ModelError("the tree kernel numbers slots with 32 bits: give a smaller kv_memory")
        device = pool.data.device
        self._group = spec.num_heads // spec.num_kv_heads
        self._config = config = config or (FULL_PRECISION if spec.dtype == "float32" else HALF_PRECISION)
        self._tiling = Tiling(
            num_programs=_num_processors(device) * config.programs_per_processor,
            num_kv_heads=spec.num_kv_heads,
            tile_rows=config.block_m // self._group,
            block_keys=config.block_n,
            entry_keys=min(ENTRY_KEYS, next_power_of_2(pool.block_size)),
        )
        num_lanes = 2 * self._tiling.num_programs * config.block_m  # a program begins and ends at most one cut pair
        self._partials = torch.empty((num_lanes, spec.head_dim), dtype=torch.float32, device=device)
        self._partial_lse = torch.empty(num_lanes, dtype=torch.float32, device=device)
        self._static_work = torch.zeros(CAPACITY, dtype=torch.int32, device=device)
        self._work = self._static_work
        self._staging = _Staging(device)
        self._listed: tuple[Plan, WorkList] | None = None
        self._descriptors = [_descriptor(layer, config) for layer in pool.layers]

    def can_capture(self, plan: Plan) -> bool:
        """Whether the plan's work list fits the static buffer."""
        return self._work_list(plan).size <= CAPACITY

    def prepare(self, plan: Plan) -> None:
        """Copy the plan's work list to the device; waits for nothing on the device."""
        work = self._work_list(plan)
        self._work = self._static_work
        if work.size > CAPACITY:
            self._work = torch.empty(work.size, dtype=torch.int32, device=self._static_work.device)
        self._staging.upload(work, self._work)

    def run(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attend; see `AttentionBackend.run`. Rows beyond the plan's are left as they are."""
        config, spec = self._config, self.spec
        if query.stride(2) != 1 or query.stride(1) != spec.head_dim:
            query = query.contiguous()
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        attend_items[(self._tiling.num_programs,)](
            query,
            output,
            self.pool.layers[layer],
            self._descriptors[layer],
            self._partials,
            self._partial_lse,
            self._work,
            scale * LOG2_E,
            self.pool.layers[layer].shape[2],
            query.stride(0),
            NUM_KV_HEADS=spec.num_kv_heads,
            GROUP=self._group,
            HEAD_DIM=spec.head_dim,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            ENTRY_KEYS=self._tiling.entry_keys,
            STAGES=config.num_stages,
            PRECISION="ieee" if spec.dtype == "float32" else "tf32",
            USE_TILES=config.use_tiles,
            num_warps=config.num_warps,
        )
        merge_partials[query.shape[0], spec.num_heads](
            output,
            self._partials,
            self._partial_lse,
            self._work,
            NUM_KV_HEADS=spec.num_kv_heads,
            GROUP=self._group,
            HEAD_DIM=spec.head_dim,
            BLOCK_M=config.block_m,
            WIDTH=MERGE_WIDTH,
            num_warps=4,
        )
        return output

    def _work_list(self, plan: Plan) -> WorkList:
        """Kept, since `can_capture` and `prepare` both ask."""
        if self._listed is None or self._listed[0] is not plan:
            self._listed = (plan, build(plan, self._tiling))
        return self._listed[1]


class _Staging:
    """Two pinned buffers in turn: one is filled while the other's copy may still be on its way."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._buffers = [torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32)]
        self._copied = [torch.cuda.Event(), torch.cuda.Event()] if self._is_cuda else []
        self._turn = 0

    def upload(self, work: WorkList, into: Tensor) -> None:
        """Pack into pinned memory, copy on the current stream."""
        self._turn ^= 1
        if self._is_cuda:
            self._copied[self._turn].synchronize()  # of the copy two steps ago
        if self._buffers[self._turn].numel() < work.size:
            size = max(CAPACITY, work.size)
            self._buffers[self._turn] = torch.empty(size, dtype=torch.int32, pin_memory=self._is_cuda)
        staged = self._buffers[self._turn][: work.size]
        work.pack(staged.numpy())
        into[: work.size].copy_(staged, non_blocking=True)
        if self._is_cuda:
            self._copied[self._turn].record()


def why_unsupported(spec: ModelSpec) -> str | None:
    """Why the kernels cannot run a model of these dimensions; None if they can."""
    if spec.head_dim not in HEAD_DIMS:
        return f"the tree kernel is made for heads of {HEAD_DIMS} numbers, not {spec.head_dim}"
    if spec.num_heads // spec.num_kv_heads > MAX_GROUP:
        return f"the tree kernel takes at most {MAX_GROUP} query heads for each K/V head"
    return None


def _descriptor(layer: Tensor, config: KernelConfig) -> TensorDescriptor | None:
    """What the tensor memory accelerator is told of a layer, [2, num_kv_heads, num_slots, head_dim], seen as rows."""
    if not config.use_tiles:
        return None
    return TensorDescriptor.from_tensor(layer.view(-1, layer.shape[3]), [config.block_n, layer.shape[3]])


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
