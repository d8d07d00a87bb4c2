"""This engine's side of the workloads, through its public surface."""

from __future__ import annotations

import time

from dendrite.bench.peers.protocol import TreeTask, TreeTimes
from dendrite.engine.engine import Engine


def run_tree(engine: Engine, task: TreeTask) -> TreeTimes:
    """One repetition; nothing of the one before is found in the engine."""
    engine.clear_cache()
    began = time.perf_counter()
    with engine.root(token_ids=task.prompt, seed=task.seed) as root:
        with root.fork() as probe:
            probe.generate(max_tokens=1, ignore_eos=True)
        prefilled = time.perf_counter()
        branches = root.fork(task.num_branches)
        forked = time.perf_counter()
        engine.generate(branches, max_tokens=task.num_tokens, temperature=task.temperature, ignore_eos=True)
        done = time.perf_counter()
        for branch in branches:
            branch.prune()
    # The first token of each branch is drawn from the prompt's last row, as the peers draw it.
    num_decoded = task.num_branches * (task.num_tokens - 1)
    return TreeTimes(prefilled - began, forked - prefilled, done - forked, num_decoded)


def warm_up(engine: Engine) -> None:
    """The first steps pay for what later ones find ready."""
    run_tree(engine, TreeTask([1] * 8, 2, 4, 1.0, 0))
