"""`dendrite bench fork`: what a fork and a prune cost, at any length and depth, idle and while the engine steps."""

from __future__ import annotations

import gc
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from dendrite.bench.figures import Figure, Result, figure
from dendrite.bench.rounds import Progress
from dendrite.bench.sitting import Sitting
from dendrite.bench.subject import Subject
from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine

CONTEXTS = (128, 2048, 8000)
DEPTHS = (1, 10, 100, 500)
DEPTH_CONTEXT = 2048
"""Tokens of the root below which branches are nested, one token a level."""
CHILDREN = 64
CHILDREN_CONTEXT = 4096
BATCH = 100
"""Calls of which the median is one sample, so that one interruption by the system is no figure."""
MAX_MICROSECONDS = 10.0
MAX_SPREAD = 1.2


@dataclass(frozen=True, slots=True)
class ForkTimes:
    """Of one parent: one sample a batch of calls, in microseconds; medians, but for the slow ones."""

    forks: list[float]
    prunes: list[float]
    slow_forks: list[float]
    """The 99th percentile of each batch: calls that met a step at its bookkeeping."""


def bench_fork(subject: Subject, *, num_batches: int = 20, progress: Progress) -> Result:
    """Measure forks on a model or a shape.

    Args:
        subject: what is measured; contexts longer than its own are left out.
        num_batches: how many hundreds of calls for each parent.
        progress: told what runs now.

    Raises:
        ModelError: as `Subject.engine` does.
    """
    sitting = Sitting("fork")
    with subject.engine() as engine:
        figures = fork_figures(engine, num_batches, progress)
        name = engine.name
    notes = [f"one sample is the median of {BATCH} calls"]
    return sitting.result(name, figures, notes, device=subject.device_type)


def fork_figures(engine: Engine, num_batches: int, progress: Progress) -> list[Figure]:
    """Everything about forks, on a loaded engine."""
    return [*_times(engine, num_batches, progress), *_blocks(engine, progress)]


def slowest_forks(figures: Sequence[Figure]) -> Iterator[Figure]:
    """The short form: the slowest parent's fork, idle and stepping, and what children hold."""
    for state in ("idle", "stepping"):
        forks = [found for found in figures if found.name == "fork" and found.workload.endswith(f", {state}")]
        slowest = max(forks, key=lambda found: found.median)
        yield replace(slowest, workload=f"fork: slowest of {len(forks)} parents, {state}", note=slowest.workload)
    for found in figures:
        if found.unit == "blocks":
            yield replace(found, workload=f"fork: {found.workload}")


def _times(engine: Engine, num_batches: int, progress: Progress) -> Iterator[Figure]:
    with ExitStack() as stack:
        progress("computing the contexts")
        contexts = {
            f"{length:,} tokens": stack.enter_context(warm_root(engine, length))
            for length in CONTEXTS
            if length < engine.spec.context_length
        }
        depths = _nested(engine, stack)
        other = stack.enter_context(warm_root(engine, min(256, engine.spec.context_length // 2)))
        progress("forking, engine idle")
        yield from _figures("idle", time_forks(contexts, num_batches), time_forks(depths, num_batches))
        progress("forking while the engine steps")
        with generating(other) as steps:
            figures = list(_figures("stepping", time_forks(contexts, num_batches), time_forks(depths, num_batches)))
        yield from figures
        yield figure("stepping", "dendrite", "steps meanwhile", "", [float(steps())])


def time_forks(parents: Mapping[str, Branch], num_batches: int) -> dict[str, ForkTimes]:
    """Fork and prune each parent in turn, call by call."""
    times = {name: ForkTimes([], [], []) for name in parents}
    clock = time.perf_counter_ns
    for _ in range(num_batches):
        gc.collect()
        forks: dict[str, list[int]] = {name: [] for name in parents}
        prunes: dict[str, list[int]] = {name: [] for name in parents}
        for _ in range(BATCH):
            for name, parent in parents.items():
                began = clock()
                child = parent.fork()
                forked = clock()
                child.prune()
                pruned = clock()
                forks[name].append(forked - began)
                prunes[name].append(pruned - forked)
        for name, result in times.items():
            result.forks.append(statistics.median(forks[name]) / 1e3)
            result.slow_forks.append(sorted(forks[name])[BATCH * 99 // 100] / 1e3)
            result.prunes.append(statistics.median(prunes[name]) / 1e3)
    return times


def _figures(state: str, contexts: dict[str, ForkTimes], depths: dict[str, ForkTimes]) -> Iterator[Figure]:
    for name, times in (*contexts.items(), *depths.items()):
        yield figure(f"{name}, {state}", "dendrite", "fork", "µs", times.forks, at_most=MAX_MICROSECONDS)
        yield figure(f"{name}, {state}", "dendrite", "prune", "µs", times.prunes)
    for what, group in (("contexts", contexts), ("depths", depths)):
        medians = [statistics.median(times.forks) for times in group.values()]
        spread = max(medians) / min(medians)
        slow = [sample for times in group.values() for sample in times.slow_forks]
        yield figure(f"all {what}, {state}", "dendrite", "fork, 99th percentile", "µs", slow)
        yield figure(f"all {what}, {state}", "dendrite", "slowest ÷ fastest fork", "", [spread], at_most=MAX_SPREAD)


def _blocks(engine: Engine, progress: Progress) -> Iterator[Figure]:
    """What children hold: nothing until they diverge, a block each when they have."""
    length = min(CHILDREN_CONTEXT, engine.spec.context_length // 2)
    progress(f"{CHILDREN} children of {length:,} tokens")
    workload = f"{CHILDREN} children of {length:,} tokens"
    with warm_root(engine, length) as root:
        before = engine.stats()
        children = root.fork(CHILDREN)
        forked = engine.stats()
        engine.generate(children, max_tokens=2, temperature=1.0, ignore_eos=True)
        diverged = engine.stats()
    held = forked.blocks_used - before.blocks_used
    each = (diverged.blocks_used - before.blocks_used) / CHILDREN
    yield figure(workload, "dendrite", "blocks of their own, just forked", "blocks", [float(held)], at_most=0)
    yield figure(workload, "dendrite", "blocks each, diverged", "blocks", [each], at_most=1)
    yield figure(workload, "dendrite", "blocks shared by all", "blocks", [float(before.blocks_used)])


@contextmanager
def warm_root(engine: Engine, length: int) -> Iterator[Branch]:
    """A root of this many random tokens, like no other root's, with its K/V computed."""
    draw = random.Random(length)
    with engine.root(token_ids=[draw.randrange(engine.spec.vocab_size) for _ in range(length)]) as root:
        with root.fork() as probe:
            probe.generate(max_tokens=1, ignore_eos=True)
        yield root


def _nested(engine: Engine, stack: ExitStack) -> dict[str, Branch]:
    """Branches at every depth that is measured, each level one token longer."""
    deepest = max(DEPTHS)
    length = min(DEPTH_CONTEXT, engine.spec.context_length - deepest - 2)
    branch = stack.enter_context(warm_root(engine, max(1, length)))
    found: dict[str, Branch] = {}
    for depth in range(1, min(deepest, engine.spec.context_length - branch.num_tokens - 2) + 1):
        branch = stack.enter_context(branch.fork()).append([depth % engine.spec.vocab_size])
        if depth in DEPTHS:
            found[f"depth {depth}"] = branch
    with branch.fork() as probe:
        probe.generate(max_tokens=1, ignore_eos=True)
    return found


@contextmanager
def generating(parent: Branch) -> Iterator[Callable[[], int]]:
    """Keeps the engine stepping in another thread; gives a function that says how many steps it made."""
    done = threading.Event()
    engine = parent.engine
    first = engine.stats().steps

    def go_on() -> None:
        while not done.is_set():
            with parent.fork() as branch:
                branch.generate(max_tokens=32, temperature=1.0, ignore_eos=True)

    thread = threading.Thread(target=go_on, name="dendrite-bench-steps")
    thread.start()
    try:
        yield lambda: engine.stats().steps - first
    finally:
        done.set()
        thread.join()
