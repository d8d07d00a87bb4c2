"""`dendrite bench constraints`: what constraints cost a step of many branches, and what forced tokens save."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from dendrite.bench.figures import Figure, Result, figure
from dendrite.bench.ours import warm_up
from dendrite.bench.rounds import Progress, Run, take_turns
from dendrite.bench.sitting import Sitting
from dendrite.engine.branch import Branch
from dendrite.engine.constraints import Constraint
from dendrite.engine.engine import Engine
from dendrite.engine.generation import Generation

PROMPT = "Facts about the people on the list, as JSON.\n"
FREE = "free"
MOST_OVERHEAD = 1.05
"""A constrained step may take this many times as long as a free one."""

KINDS = {
    "JSON strings": Constraint(schema={"type": "array", "items": {"type": "string"}, "minItems": 1000}),
    "letters": Constraint(regex="[A-Za-z ,.]+"),
}
"""Constraints under which almost every token is drawn from many: all cost and no gain."""
_FIELDS = {
    f"how_many_{what}_this_person_has": {"type": "integer", "minimum": 0, "maximum": 9}
    for what in ("brothers", "sisters", "children", "cousins", "neighbours")
}
RECORD = Constraint(
    schema={"type": "object", "properties": _FIELDS, "required": list(_FIELDS), "additionalProperties": False}
)
"""Fixed keys, a digit each: all but the digits is forced."""


def bench_constraints(
    model: str, *, num_branches: int, num_tokens: int, num_rounds: int, dtype: str, progress: Progress
) -> Result:
    """Time the steps of the same branches free and constrained, and a record with fixed keys, in turns.

    Raises:
        ModelError, RequestError: as `Engine.load` does.
    """
    sitting = Sitting("constraints")
    with Engine.load(model, dtype=dtype) as engine:
        progress("warming up")
        warm_up(engine)
        figures = [
            *_overhead(engine, num_branches, num_tokens, num_rounds, progress),
            *_forced(engine, num_branches, num_rounds, progress),
        ]
        name = engine.name
    note = f"{dtype}; temperature 0.8; a step is the engine's own busy time over its number of steps"
    return sitting.result(name, figures, [note])


def _overhead(
    engine: Engine, num_branches: int, num_tokens: int, num_rounds: int, progress: Progress
) -> Iterator[Figure]:
    """Every branch draws every token: `fast_forward` is off, so that all run the same number of steps."""
    workload = f"{num_branches} × {num_tokens}"
    runs: dict[str, Run] = {}
    for name, constraint in ((FREE, None), *KINDS.items()):
        runs[name] = partial(_step, engine, num_branches, num_tokens, constraint)
    take_turns(runs, num_rounds=1, progress=progress, workload=f"{workload}, unmeasured")
    samples = take_turns(runs, num_rounds=num_rounds, progress=progress, workload=workload)
    free = samples[FREE]["step"]
    for name in runs:
        yield figure(workload, name, "step", "ms", samples[name]["step"])
    for name in KINDS:
        times = [mine / other for mine, other in zip(samples[name]["step"], free, strict=True)]
        yield figure(workload, name, "constrained ÷ free step", "", times, at_most=MOST_OVERHEAD)


def _step(engine: Engine, num_branches: int, num_tokens: int, constraint: Constraint | None) -> Mapping[str, float]:
    def generate(branches: Sequence[Branch]) -> list[Generation]:
        return engine.generate(
            branches,
            max_tokens=num_tokens,
            temperature=0.8,
            ignore_eos=True,
            constraint=constraint,
            fast_forward=False,
        )

    _, seconds, num_steps = _timed(engine, num_branches, generate)
    return {"step": seconds / num_steps * 1e3}


def _forced(engine: Engine, num_branches: int, num_rounds: int, progress: Progress) -> Iterator[Figure]:
    """The record, and as many tokens of free text."""

    def constrained(branches: Sequence[Branch]) -> list[Generation]:
        return engine.generate(branches, max_tokens=1000, temperature=0.8, constraint=RECORD)

    outs, _, _ = _timed(engine, num_branches, constrained)
    length = len(outs[0].token_ids)

    def free(branches: Sequence[Branch]) -> list[Generation]:
        return engine.generate(branches, max_tokens=length, temperature=0.8, ignore_eos=True)

    workload = f"{num_branches} records of {length} tokens"
    runs: dict[str, Run] = {"fixed keys": lambda: _seconds(engine, num_branches, constrained)}
    runs[FREE] = lambda: _seconds(engine, num_branches, free)
    samples = take_turns(runs, num_rounds=num_rounds, progress=progress, workload=workload)
    for name, measured in samples.items():
        for what, values in measured.items():
            yield figure(workload, name, what, {"whole": "s", "steps": "steps"}[what], values)
    mine, other = (statistics.median(samples[name]["whole"]) for name in ("fixed keys", FREE))
    share = outs[0].num_forced / length
    yield figure(workload, "fixed keys", "free ÷ constrained time", "", [other / mine], note=f"{share:.0%} forced")


def _seconds(
    engine: Engine, num_branches: int, generate: Callable[[Sequence[Branch]], list[Generation]]
) -> Mapping[str, float]:
    _, seconds, num_steps = _timed(engine, num_branches, generate)
    return {"whole": seconds, "steps": num_steps}


def _timed(
    engine: Engine, num_branches: int, generate: Callable[[Sequence[Branch]], list[Generation]]
) -> tuple[list[Generation], float, int]:
    """What was generated onto forks of the computed prompt, the engine's busy seconds and its steps."""
    with engine.root(PROMPT, seed=0) as root:
        root.score(["x"])  # the prompt is computed before the clock starts
        branches = root.fork(num_branches)
        before = engine.stats()
        outs = generate(branches)
        after = engine.stats()
        for branch in branches:
            branch.prune()
    return outs, after.busy_seconds - before.busy_seconds, after.steps - before.steps
