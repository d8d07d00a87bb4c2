"""`dendrite bench attention`: attention alone, one layer of decoding rows over trees of many shapes, and of prompts.

On a GPU the kernels are replayed in a CUDA graph and timed with events, beside FlashInfer's where it is installed. A
figure stands beside its floor: the larger of the K/V's bytes, each read once, at the device's bandwidth, and the
products at its rate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dendrite.bench.attention_trees import BLOCK_SIZE, Tree, prompts, trees
from dendrite.bench.figures import Figure, Result, figure
from dendrite.bench.flashinfer_rivals import rivals
from dendrite.bench.floors import Rates, rates_of
from dendrite.bench.machine import this_machine
from dendrite.bench.rounds import Progress
from dendrite.bench.shapes import config_of
from dendrite.bench.sitting import Sitting
from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.attention.cpu import TreeAttention
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec

GOALS = {
    "star: 8 × 64 over 32,768": 1.4,
    "star: 64 × 64 over 32,768": 1.8,
    "star: 64 × 64 over 8,192": 2.5,
    "star: 32 × 64 over 8,192": 2.8,
}
"""A tree -> the most times its floor that is aimed at, for heads as in `GOALS_SHAPE`."""
GOALS_SHAPE = "8b"
LAUNCHES = 10
"""Launches of one sample: a graph of as many, so that what a replay itself costs is shared."""


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """What is measured."""

    shape: str = "8b"
    """Whose heads: a name in `shapes.SHAPES`."""
    device_type: str = "cpu"
    """"cpu" or "cuda"."""
    prefixes: tuple[int, ...] = (1024, 8192, 32768)
    branches: tuple[int, ...] = (8, 32, 64, 128)
    leaf: int = 64
    """Keys of its own that a branch of a star has."""
    chunk: int = 4096
    """Rows of a prompt's chunk, on a GPU only: a processor would compute for minutes. 0 leaves prompts out."""
    keys_before: tuple[int, ...] = (0, 4096, 28672)
    """Keys before the chunk."""
    num_rounds: int = 7
    """Samples of each tree."""


def bench_attention(settings: AttentionSettings, *, progress: Progress) -> Result:
    """Measure attention over trees.

    Args:
        settings: what is measured.
        progress: told what runs now.

    Raises:
        ModelError: no such shape, or heads that the device's kernels are not made for.
    """
    sitting = Sitting("attention")
    rates = rates_of(this_machine(settings.device_type).gpu)
    figures, notes = _figures(settings, rates, progress)
    notes.append(f"one sample is the mean of {LAUNCHES} launches")
    name = f"heads of the {settings.shape} shape, bfloat16"
    return sitting.result(name, figures, notes, device=settings.device_type)


def floor_ms(tree: Tree, spec: ModelSpec, rates: Rates | None) -> float | None:
    """The least milliseconds for one layer; None where the device's rates are not known."""
    if rates is None:
        return None
    itemsize = 2
    width = spec.num_heads * spec.head_dim
    moved = (tree.num_keys * spec.bytes_per_token + 2 * tree.plan.num_rows * width * itemsize) / rates.bytes_per_second
    return 1e3 * max(moved, 4 * width * tree.num_pairs / rates.flops_per_second)


def _figures(settings: AttentionSettings, rates: Rates | None, progress: Progress) -> tuple[list[Figure], list[str]]:
    spec = _spec(settings.shape)
    device = torch.device(settings.device_type)
    all_trees = list(trees(settings.prefixes, settings.branches, settings.leaf))
    if device.type == "cuda" and settings.chunk:
        all_trees += prompts(settings.chunk, settings.keys_before)
    num_blocks = max(tree.num_blocks for tree in all_trees)
    pool = KVPool(spec, num_blocks=num_blocks, block_size=BLOCK_SIZE, device=device)
    pool.data.normal_()
    backend = _backend(pool, spec, device)
    others, notes = rivals(pool, spec) if device.type == "cuda" else ({}, [])
    figures: list[Figure] = []
    for tree in all_trees:
        progress(tree.name)
        query = torch.randn((tree.plan.num_rows, spec.num_heads, spec.head_dim), device=device).to(pool.data.dtype)
        prepare = _prepare_ms(backend, tree, settings.num_rounds)
        ours = _samples_ms(lambda: backend.run(0, query, 0.1), device, settings.num_rounds)  # noqa: B023, called here
        floor = floor_ms(tree, spec, rates)
        goal = GOALS.get(tree.name) if settings.shape == GOALS_SHAPE and floor else None
        at_most = round(goal * floor, 3) if goal and floor else None
        figures.append(figure(tree.name, "dendrite", "attention", "ms", ours, floor=floor, at_most=at_most))
        figures.append(figure(tree.name, "dendrite", "prepare, host", "ms", prepare))
        for name, make in others.items():
            try:
                theirs = _samples_ms(run, device, settings.num_rounds) if (run := make(tree, query)) else None
            except RuntimeError as error:
                notes.append(f"{name} did not run {tree.name}: {str(error).splitlines()[0]}")
                continue
            if theirs is not None:
                ratio = statistics.median(theirs) / statistics.median(ours)
                figures.append(figure(tree.name, name, "attention", "ms", theirs, ratio=ratio, floor=floor))
    return figures, notes


def _spec(shape: str) -> ModelSpec:
    config = config_of(shape)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    width = config.head_dim or config.hidden_size // heads
    return ModelSpec(shape, 1, heads, kv_heads, width, heads * width, 1, 1 << 20, "bfloat16")


def _backend(pool: KVPool, spec: ModelSpec, device: torch.device) -> AttentionBackend:
    if device.type != "cuda":
        return TreeAttention(pool, spec)
    from dendrite.engine.attention.triton_tree import TritonTreeAttention  # noqa: PLC0415, needs Triton

    return TritonTreeAttention(pool, spec)


def _prepare_ms(backend: AttentionBackend, tree: Tree, num_rounds: int) -> list[float]:
    samples = []
    for _ in range(num_rounds):
        plan = replace(tree.plan)  # a new one each step, as in the engine
        began = time.perf_counter()
        backend.prepare(plan)
        samples.append(1e3 * (time.perf_counter() - began))
    return samples


def _samples_ms(run: Callable[[], Tensor], device: torch.device, num_rounds: int) -> list[float]:
    run()
    return list(_graph_ms(run, num_rounds) if device.type == "cuda" else _wall_ms(run, num_rounds))


def _wall_ms(run: Callable[[], Tensor], num_rounds: int) -> Iterator[float]:
    for _ in range(num_rounds):
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            run()
        yield 1e3 * (time.perf_counter() - began) / LAUNCHES


def _graph_ms(run: Callable[[], Tensor], num_rounds: int) -> Iterator[float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            run()
    graph.replay()
    for _ in range(num_rounds):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        yield began.elapsed_time(ended) / LAUNCHES
