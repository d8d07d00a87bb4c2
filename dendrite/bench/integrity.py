"""`dendrite bench integrity`: what canaries and checksums cost a step of many branches."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from dendrite.bench.figures import Result, figure
from dendrite.bench.ours import warm_up
from dendrite.bench.rounds import Progress, Run, take_turns
from dendrite.bench.sitting import Sitting
from dendrite.engine.engine import Engine

MODES = ("off", "canary", "checksum")
KV_MEMORY = "256MiB"


def bench_integrity(
    model: str, *, num_branches: int, prefix: int, num_tokens: int, num_rounds: int, dtype: str, progress: Progress
) -> Result:
    """Decode the same branches with each mode, in turns.

    Raises:
        ModelError, RequestError: as `Engine.load` does.
    """
    sitting = Sitting("integrity")
    workload = f"{num_branches} × {num_tokens} over {prefix}"
    with ExitStack() as stack:
        runs: dict[str, Run] = {}
        for mode in MODES:
            progress(f"loading with {mode}")
            engine = stack.enter_context(Engine.load(model, dtype=dtype, kv_memory=KV_MEMORY, integrity=mode))
            warm_up(engine)
            runs[mode] = partial(_step, engine, num_branches, prefix, num_tokens)
        take_turns(runs, num_rounds=1, progress=progress, workload=f"{workload}, unmeasured")
        samples = take_turns(runs, num_rounds=num_rounds, progress=progress, workload=workload)
        name = engine.name
    figures = [figure(workload, mode, "step", "ms", samples[mode]["step"]) for mode in MODES]
    for mode in MODES[1:]:
        ratios = [mine / other for mine, other in zip(samples[mode]["step"], samples["off"]["step"], strict=True)]
        figures.append(figure(workload, mode, "step ÷ step without checks", "", ratios))
    return sitting.result(name, figures, [f"{dtype}; temperature 0.8; a step is the engine's own busy time"])


def _step(engine: Engine, num_branches: int, prefix: int, num_tokens: int) -> Mapping[str, float]:
    vocab_size = engine.spec.vocab_size
    with engine.root(token_ids=[index * 37 % vocab_size for index in range(prefix)], seed=0) as root:
        root.score([[1]])  # the prefix is computed before the clock starts
        branches = root.fork(num_branches)
        before = engine.stats()
        engine.generate(branches, max_tokens=num_tokens, temperature=0.8, ignore_eos=True)
        after = engine.stats()
        for branch in branches:
            branch.prune()
    return {"step": (after.busy_seconds - before.busy_seconds) / (after.steps - before.steps) * 1e3}
