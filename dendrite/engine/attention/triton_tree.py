"""Tree attention on CUDA: Triton kernels over a work list, fit for captured graphs.

`prepare` turns the plan into a work list in pinned memory and copies it, without waiting, into a static buffer on the
device. `run` launches two kernels on a fixed grid that read everything about the tree from that buffer. So a graph that
was captured with one plan replays with any other that fits the buffer.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.attention.forms import KernelConfig, form_for, forms_for
from dendrite.engine.attention.line import Tiling
from dendrite.engine.attention.tree_kernel import attend_items, merge_partials
from dendrite.engine.attention.worklist import WorkList, build
from dendrite.engine.batch import Plan
from dendrite.engine.errors import ModelError
from dendrite.engine.kernels.launch import overlap
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.launching import Staging
from dendrite.engine.spec import ModelSpec

HEAD_DIMS = (16, 32, 64, 128)
MAX_GROUP = 32
"""Query heads of a K/V head; more would leave tiles of a single row."""
CAPACITY = 1 << 18
"""Numbers of the static buffer: 1 MiB, enough for half a million gathered keys."""
ENTRY_KEYS = 8
"""Keys of an entry: short enough that single-token nodes waste little of a block."""
MERGE = (8, 1)
"""Partial results that a merging program loads at once, and its warps: so few that all of a step fit the device."""
MERGE_OF_FEW = (32, 4)
"""The same where there are fewer programs than processors."""
LOG2_E = 1.4426950408889634
INTERPRETER_PROCESSORS = 3
"""What the interpreter pretends to have: few, so that tests are quick, and more than one, so that work is cut."""


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
        self._configs = (config,) if config is not None else forms_for(spec.dtype, self._group)
        self._num_processors = _num_processors(device)
        self._forms = [self._form(config) for config in self._configs]
        self._form_index = 0
        num_lanes = max(form.num_lanes for form in self._forms)
        self._partials = torch.empty((num_lanes, spec.head_dim), dtype=torch.float32, device=device)
        self._partial_lse = torch.empty(num_lanes, dtype=torch.float32, device=device)
        self._static_work = torch.zeros(CAPACITY, dtype=torch.int32, device=device)
        self._work = self._static_work
        self._staging = Staging(self._static_work)
        self._listed: tuple[Plan, int, WorkList] | None = None

    @property
    def variant(self) -> Hashable:
        """The form of the kernels that the prepared plan runs with."""
        return self._form_index

    def can_capture(self, plan: Plan) -> bool:
        """Whether the plan's work list fits the static buffer."""
        return self._work_list(plan)[1].size <= CAPACITY

    def prepare(self, plan: Plan) -> None:
        """Copy the plan's work list to the device; waits for nothing on the device."""
        self._form_index, work = self._work_list(plan)
        if (size := work.size) <= CAPACITY:
            work.pack(self._staging.array())
            self._staging.send(size)
            self._work = self._static_work
        else:
            staged = torch.empty(size, dtype=torch.int32, pin_memory=self._static_work.is_cuda)
            work.pack(staged.numpy())
            self._work = staged.to(self._static_work.device, non_blocking=True)

    def run(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attend; see `AttentionBackend.run`. Rows beyond the plan's are left as they are."""
        form, spec = self._forms[self._form_index], self.spec
        config, tiling = form.config, form.tiling
        if query.stride(2) != 1 or query.stride(1) != spec.head_dim:
            query = query.contiguous()
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        attend_items[(tiling.num_programs,)](
            query,
            output,
            self.pool.layers[layer],
            form.descriptors[layer],
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
            ENTRY_KEYS=tiling.entry_keys,
            STAGES=config.num_stages,
            PRECISION="ieee" if spec.dtype == "float32" else "tf32",
            USE_TILES=config.use_tiles,
            num_warps=config.num_warps,
            **overlap(query.device),
        )
        num_merges = query.shape[0] * spec.num_heads
        width, num_warps = MERGE if num_merges > self._num_processors else MERGE_OF_FEW
        merge_partials[query.shape[0], spec.num_heads](
            output,
            self._partials,
            self._partial_lse,
            self._work,
            NUM_KV_HEADS=spec.num_kv_heads,
            GROUP=self._group,
            HEAD_DIM=spec.head_dim,
            BLOCK_M=config.block_m,
            WIDTH=width,
            num_warps=num_warps,
            **overlap(query.device),
        )
        return output

    def _work_list(self, plan: Plan) -> tuple[int, WorkList]:
        """The form that the plan runs with and its work; kept, since `can_capture` and `prepare` both ask."""
        if self._listed is None or self._listed[0] is not plan:
            index = form_for(plan, self._configs, self._group)
            self._listed = (plan, index, build(plan, self._forms[index].tiling))
        return self._listed[1:]

    def _form(self, config: KernelConfig) -> _Form:
        tiling = Tiling(
            num_programs=self._num_processors * config.programs_per_processor,
            num_kv_heads=self.spec.num_kv_heads,
            tile_rows=config.block_m // self._group,
            block_keys=config.block_n,
            entry_keys=min(ENTRY_KEYS, next_power_of_2(self.pool.block_size)),
            min_share=config.min_share,
        )
        return _Form(config, tiling, [_descriptor(layer, config) for layer in self.pool.layers])


@dataclass(frozen=True, slots=True)
class _Form:
    """A form of the kernel with what it is given of this pool."""

    config: KernelConfig
    tiling: Tiling
    descriptors: list[TensorDescriptor | None]
    """Of each layer."""

    @property
    def num_lanes(self) -> int:
        """Lanes of partial results: a program begins and ends at most one cut pair."""
        return 2 * self.tiling.num_programs * self.config.block_m


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
