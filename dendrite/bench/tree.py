"""`dendrite bench tree`: many branches over one prompt, beside other engines in the same run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from dendrite.bench.busy import busy_figures
from dendrite.bench.figures import Figure, Result, figure
from dendrite.bench.ours import run_tree, warm_up
from dendrite.bench.peers.process import Peer
from dendrite.bench.peers.protocol import PeerError, TreeTask, TreeTimes
from dendrite.bench.peers.rivals import Rival, rivals_for
from dendrite.bench.rounds import Progress, Run, Samples, ratio_of, take_turns
from dendrite.bench.sitting import Sitting
from dendrite.engine.engine import Engine

OURS = "dendrite"
TEMPERATURE = 0.8
FORK = "fork"


@dataclass(frozen=True, slots=True)
class TreeSettings:
    """What is run, and beside whom."""

    num_branches: int = 32
    num_tokens: int = 64
    prefixes: tuple[int, ...] = (512, 2048)
    dtype: str = "bfloat16"
    peers: tuple[str, ...] = ("hf",)
    peer_python: str | None = None
    """The interpreter of another environment that has llama-cpp-python; None is this one."""
    gguf: str | None = None
    """The file that llama.cpp runs; None is the one the model was made of."""
    num_rounds: int = 3
    patience: float = 60.0
    """Seconds after which a rival takes part in no further round of a workload."""
    busy: bool = False


@dataclass(frozen=True, slots=True)
class Contender:
    """A rival whose process is up."""

    rival: Rival
    peer: Peer


def bench_tree(model: str, settings: TreeSettings, *, progress: Progress) -> Result:
    """Run the same branches on this engine and on its peers, in turns.

    Raises:
        ModelError, RequestError: as `Engine.load` does.
        PeerError: a peer is unknown, or its process died at its work. One that cannot start is left out with a note.
    """
    rivals = rivals_for(model, settings.peers, dtype=settings.dtype, gguf=settings.gguf, python=settings.peer_python)
    sitting = Sitting("tree")
    notes = [f"{settings.dtype}; temperature {TEMPERATURE}; wall time through each engine's Python API"]
    with ExitStack() as stack:
        engine = stack.enter_context(Engine.load(model, dtype=settings.dtype))
        contenders = []
        for rival in rivals:
            progress(f"starting {rival.name}")
            try:
                peer = stack.enter_context(rival.start())
            except PeerError as error:
                notes.append(f"left out: {error}")
                continue
            contenders.append(Contender(rival, peer))
            notes.append(f"{rival.name}: {peer.version}; {rival.about}")
        progress("warming up")
        warm_up(engine)
        figures = list(_figures(engine, contenders, settings, progress))
        name = engine.name
    return sitting.result(name, figures, notes)


def _figures(
    engine: Engine, contenders: Sequence[Contender], settings: TreeSettings, progress: Progress
) -> Iterator[Figure]:
    shapes = [(settings.num_branches, length) for length in settings.prefixes]
    if settings.num_branches > 1:
        shapes.append((1, settings.prefixes[0]))
    for num_branches, length in shapes:
        task = TreeTask(_prompt(engine, length), num_branches, settings.num_tokens, TEMPERATURE, seed=0)
        yield from compare(engine, contenders, task, settings, progress)
    if settings.busy:
        task = TreeTask(
            _prompt(engine, settings.prefixes[0]), settings.num_branches, settings.num_tokens, TEMPERATURE, seed=0
        )
        yield from busy_figures(engine, task, num_rounds=settings.num_rounds, progress=progress)


def compare(
    engine: Engine, contenders: Sequence[Contender], task: TreeTask, settings: TreeSettings, progress: Progress
) -> Iterator[Figure]:
    """One workload, everybody's figures."""
    workload = f"{task.num_branches} × {task.num_tokens} over {len(task.prompt):,}"
    contenders = [contender for contender in contenders if _takes_part(contender.rival, task)]
    runs: dict[str, Run] = {OURS: lambda: _measured(run_tree(engine, task), task)}
    tasks = {contender.rival.name: _shortened(task, contender.rival) for contender in contenders}
    for contender in contenders:
        runs[contender.rival.name] = partial(_run_peer, contender.peer, tasks[contender.rival.name])
    samples = take_turns(
        runs, num_rounds=settings.num_rounds, patience=settings.patience, progress=progress, workload=workload
    )
    ours = samples[OURS]
    for what, values in ours.items():
        yield figure(workload, OURS, what, _unit(what), values)
    for contender in contenders:
        rival = contender.rival
        yield from _beside(workload, rival, samples[rival.name], ours, tasks[rival.name])


def _beside(workload: str, rival: Rival, theirs: Samples, ours: Samples, task: TreeTask) -> Iterator[Figure]:
    is_short = rival.most_tokens == task.num_tokens
    for what, values in theirs.items():
        if is_short and what == "whole":  # fewer tokens after the same prompt: not the same work
            continue
        goal = rival.goals.get((task.num_branches, len(task.prompt), what))
        note = f"over {task.num_tokens} tokens" if is_short and what == "decode" else ""
        ratio = ratio_of(ours[what], values, more_is_better=what != FORK)
        yield figure(workload, rival.name, what, _unit(what), values, ratio=ratio, ratio_at_least=goal, note=note)


def _takes_part(rival: Rival, task: TreeTask) -> bool:
    limit = rival.most_prompt_tokens
    return limit is None or task.num_branches * len(task.prompt) <= limit


def _unit(what: str) -> str:
    return "µs each" if what == FORK else "tokens/s"


def _run_peer(peer: Peer, task: TreeTask) -> Mapping[str, float]:
    return _measured(peer.run(task), task)


def _measured(times: TreeTimes, task: TreeTask) -> dict[str, float]:
    """Tokens a second: of the prompt, counted once whoever repeats it; decoded; and from nothing to the last token.

    And microseconds a branch, for engines that make branches of a computed prompt.
    """
    measured = {FORK: times.fork_s / task.num_branches * 1e6} if times.fork_s else {}
    return measured | {
        "prefill": len(task.prompt) / times.prefill_s,
        "decode": times.num_decoded / times.decode_s,
        "whole": task.num_branches * task.num_tokens / (times.prefill_s + times.fork_s + times.decode_s),
    }


def _shortened(task: TreeTask, rival: Rival) -> TreeTask:
    if rival.most_tokens is None or rival.most_tokens >= task.num_tokens:
        return task
    return replace(task, num_tokens=rival.most_tokens)


def _prompt(engine: Engine, length: int) -> list[int]:
    draw = random.Random(length)
    return [draw.randrange(engine.spec.vocab_size) for _ in range(length)]
