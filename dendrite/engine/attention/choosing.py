"""Chooses for each step what computes its attention: the tree kernel, or FlashInfer's prefill where it is installed.

    rows of the step        up to `captured_rows`                      more
    chosen from             the tree kernel, which a graph replays     whichever the cost model says is faster

Only prefill is measured when a model is loaded. Decoding steps are replayed as graphs, which FlashInfer's wrappers are
not made for, and in `dendrite bench attention` its decode and its cascade have been slower over every tree. What was
measured is kept for the machine, its versions and the model's heads, so that later loads choose alike and at once. It
is the time of a layer on the device; what the host does for a step is hidden behind the step before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.attention.costs import Cost, Work, fitted, paged_work, store_costs, stored_costs, tree_work
from dendrite.engine.attention.flashinfer import FlashInferAttention, why_unsupported
from dendrite.engine.attention.triton_tree import TritonTreeAttention
from dendrite.engine.batch import Plan, Segment
from dendrite.engine.errors import ModelError
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec

NAMES = ("tree", "flashinfer prefill")
PACKAGES = ("torch", "triton", "flashinfer-python", "dendrite-engine")
"""Whose versions a measurement is good for."""
PROBES = ((1, 512, 0), (1, 1024, 8192), (16, 64, 4096), (1, 2048, 2048), (1, 4096, 0), (1, 4096, 28672))
"""What is measured: (number of chunks, rows of each, keys that they share before them)."""
LEAST_PROBES = 4
"""The model has three constants. A pool that holds fewer probes never sees the steps that this is about."""
RUNS = 5
SCALE = 0.1
"""Of the scores while measuring; any would do."""
TOLERANCE = 0.02
"""How far FlashInfer may be off the tree kernel, as a part of the output's length."""

Seconds: TypeAlias = Callable[[AttentionBackend, Plan, Tensor], float]
"""Measures a layer's attention: of a back end, for a plan and its query [num_rows, num_heads, head_dim]."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A back end, what a plan asks of it, and what that costs."""

    backend: AttentionBackend
    work: Callable[[Plan], Work]
    cost: Cost

    def seconds(self, plan: Plan) -> float:
        """What the model says."""
        return self.cost.seconds(self.work(plan))


class ChoosingAttention(AttentionBackend):
    """Runs each plan with the candidate that costs the least."""

    def __init__(self, pool: KVPool, spec: ModelSpec, candidates: Sequence[Candidate], *, captured_rows: int) -> None:
        """Take the candidates; the first one runs every plan of up to `captured_rows` rows, and can be captured."""
        super().__init__(pool, spec)
        self._candidates = candidates
        self._captured_rows = captured_rows
        self._chosen = 0

    def choice(self, plan: Plan) -> int:
        """Which of the candidates runs the plan; the first among equals."""
        if plan.num_rows <= self._captured_rows:
            return 0
        seconds = [candidate.seconds(plan) for candidate in self._candidates]
        return seconds.index(min(seconds))

    def prepare(self, plan: Plan) -> None:
        """Choose, and have the chosen one prepare."""
        self._chosen = self.choice(plan)
        self._candidates[self._chosen].backend.prepare(plan)

    def run(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attend with what was chosen; see `AttentionBackend.run`."""
        return self._candidates[self._chosen].backend.run(layer, query, scale)

    @property
    def variant(self) -> Hashable:
        """The chosen candidate and its variant."""
        return self._chosen, self._candidates[self._chosen].backend.variant

    def can_capture(self, plan: Plan) -> bool:
        """Whether the one that would be chosen can."""
        return self._candidates[self.choice(plan)].backend.can_capture(plan)


def device_attention(
    pool: KVPool, spec: ModelSpec, *, captured_rows: int, folder: Path, say: Callable[[str], None]
) -> AttentionBackend:
    """The attention of a CUDA device: the tree kernel, and FlashInfer's prefill beside it where that pays.

    Args:
        pool: still without anybody's K/V: measuring writes to it.
        spec: the model's dimensions.
        captured_rows: rows of the largest step that is replayed as a graph.
        folder: where measurements are kept.
        say: told one line before FlashInfer's kernels are compiled, which takes a minute the first time.

    Raises:
        ModelError: the tree kernel is not made for the model.
    """
    tree = TritonTreeAttention(pool, spec)
    if find_spec("flashinfer") is None or why_unsupported(pool, spec) is not None:
        return tree
    make = partial(FlashInferAttention, pool, spec)
    try:
        with torch.cuda.device(pool.data.device):  # kernels and events go where the thread is, not where tensors are
            return chosen_from(
                tree, make, captured_rows=captured_rows, folder=folder, say=say, seconds=seconds_on_device
            )
    except Exception as error:  # noqa: BLE001 - a compiler fails in many ways, and none of them is worth a load
        warnings.warn(
            f"FlashInfer is installed but not used, attention runs on Dendrite's own kernels: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            stacklevel=2,
        )
        return tree


def chosen_from(
    tree: AttentionBackend,
    make_other: Callable[[], AttentionBackend],
    *,
    captured_rows: int,
    folder: Path,
    say: Callable[[str], None],
    seconds: Seconds,
) -> AttentionBackend:
    """The tree kernel alone if the other one never pays; otherwise both, ready to run."""
    pool, spec = tree.pool, tree.spec
    plans = probe_plans(pool, spec)
    if len(plans) < LEAST_PROBES:
        return tree
    key, other = _key(pool, spec), None
    costs = stored_costs(folder, key, NAMES)
    if costs is None:
        say("measuring FlashInfer's prefill beside Dendrite's: its kernels are compiled the first time, for a minute")
        other = make_other()
        costs = measured_costs(tree, other, plans, seconds)
        store_costs(folder, key, dict(zip(NAMES, costs, strict=True)))
    works = (tree_work, paged_work)
    if all(costs[0].seconds(tree_work(plan)) <= costs[1].seconds(paged_work(plan)) for plan in plans):
        return tree
    if other is None:
        other = make_other()
        other.prepare(plans[0])  # loads its kernels now, not within a step
    candidates = [Candidate(*each) for each in zip((tree, other), works, costs, strict=True)]
    return ChoosingAttention(pool, spec, candidates, captured_rows=captured_rows)


def probe_plans(pool: KVPool, spec: ModelSpec) -> list[Plan]:
    """The steps that are measured, as many as the pool and the model's context hold."""
    plans = []
    for num_chunks, num_rows, before in PROBES:
        chunk = -(-num_rows // pool.block_size) * pool.block_size
        shared = before // pool.block_size * pool.block_size
        is_held = shared + num_chunks * chunk <= pool.num_blocks * pool.block_size
        if is_held and shared + num_rows <= spec.context_length:
            plans.append(_probe(num_chunks, num_rows, chunk, shared, first=pool.block_size))
    return plans


@torch.inference_mode()
def measured_costs(
    tree: AttentionBackend, other: AttentionBackend, plans: Sequence[Plan], seconds: Seconds
) -> list[Cost]:
    """Both back ends' costs, from the time that each takes for the plans.

    Raises:
        ModelError: they do not compute the same.
    """
    pool, spec = tree.pool, tree.spec
    most_rows = max(plan.num_rows for plan in plans)
    query = torch.randn((most_rows, spec.num_heads, spec.head_dim), device=pool.data.device).to(pool.data.dtype)
    keys = pool.layers[0][:, :, pool.block_size :]  # the trash block may be anything
    keys.normal_()
    try:
        _check_alike(tree, other, plans[0], query)
        return [
            fitted([work(plan) for plan in plans], [seconds(each, plan, query[: plan.num_rows]) for plan in plans])
            for each, work in ((tree, tree_work), (other, paged_work))
        ]
    finally:
        keys.zero_()


def seconds_on_device(backend: AttentionBackend, plan: Plan, query: Tensor) -> float:
    """The shortest of a few runs, launched as a step that is too large for a graph launches them."""
    backend.prepare(plan)
    backend.run(0, query, SCALE)  # compiles
    times = []
    for _ in range(RUNS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        for _ in range(RUNS):
            backend.run(0, query, SCALE)
        ended.record()
        ended.synchronize()
        times.append(float(began.elapsed_time(ended)) / 1000 / RUNS)
    return min(times)


def _probe(num_chunks: int, num_rows: int, chunk: int, shared: int, *, first: int) -> Plan:
    """Chunks side by side behind one prefix, in slots from `first` on."""
    segments = [Segment(((first, first + shared),), shared, 0, num_chunks * num_rows)] if shared else []
    for index in range(num_chunks):
        slot, row = first + shared + index * chunk, index * num_rows
        segments.append(Segment(((slot, slot + num_rows),), num_rows, row, row + num_rows, num_rows))
    return Plan(num_chunks * num_rows, tuple(segments))


def _check_alike(tree: AttentionBackend, other: AttentionBackend, plan: Plan, query: Tensor) -> None:
    outputs = []
    for backend in (tree, other):
        backend.prepare(plan)
        outputs.append(backend.run(0, query[: plan.num_rows], SCALE).float())
    distance = torch.linalg.vector_norm(outputs[1] - outputs[0])
    if not distance <= TOLERANCE * torch.linalg.vector_norm(outputs[0]):  # NaN is not either
        raise ModelError("FlashInfer's attention is not the tree kernel's")


def _key(pool: KVPool, spec: ModelSpec) -> str:
    device = pool.data.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    versions = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    heads = f"{spec.num_heads} over {spec.num_kv_heads} heads of {spec.head_dim}, {spec.dtype}"
    return f"{name}; {versions}; {heads}, blocks of {pool.block_size}, pool of {len(probe_plans(pool, spec))} probes"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
