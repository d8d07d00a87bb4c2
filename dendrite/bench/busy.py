"""What a program's own Python costs the engine: a busy thread beside it, against a busy process."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from dendrite.bench.figures import Figure, figure
from dendrite.bench.ours import run_tree
from dendrite.bench.peers.protocol import TreeTask
from dendrite.bench.rounds import Progress, ratio_of, take_turns
from dendrite.engine.engine import Engine

MAX_SLOWDOWN = 1.2
STEP = "step"


def busy_figures(engine: Engine, task: TreeTask, *, num_rounds: int, progress: Progress) -> Iterator[Figure]:
    """Time of a step: quiet, beside a busy process, and with a busy thread in this one."""
    workload = f"{task.num_branches} × {task.num_tokens} over {len(task.prompt):,}"

    def step_time(company: AbstractContextManager[None]) -> dict[str, float]:
        with company:
            return {STEP: run_tree(engine, task).decode_s / (task.num_tokens - 1) * 1e3}

    samples = take_turns(
        {
            "quiet": lambda: step_time(nullcontext()),
            "busy process": lambda: step_time(busy_process()),
            "busy thread": lambda: step_time(busy_thread()),
        },
        num_rounds=num_rounds,
        progress=progress,
        workload="busy",
    )
    for name, values in samples.items():
        yield figure(workload, f"dendrite, {name}", STEP, "ms", values[STEP])
    slowdown = ratio_of(samples["busy thread"][STEP], samples["busy process"][STEP])
    yield figure(workload, "dendrite", "busy thread ÷ busy process", "", [slowdown], at_most=MAX_SLOWDOWN)


@contextmanager
def busy_thread() -> Iterator[None]:
    """A Python thread that never rests."""
    done = threading.Event()

    def spin() -> None:
        count = 0
        while not done.is_set():
            count += 1

    thread = threading.Thread(target=spin, name="dendrite-bench-busy")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that never rests."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()
