"""`dendrite bench pressure`: the same search in less and less memory, and how long it takes then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from dendrite.bench.figures import Figure, Result, figure
from dendrite.bench.ours import warm_up
from dendrite.bench.plot import NOTHING_BUT_THE_PICTURE, PlotError
from dendrite.bench.rounds import Progress, Run, take_turns
from dendrite.bench.sitting import Sitting
from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine

PROMPT = "A plan for a garden that needs little water, with the reasons for every step of it.\n"
DEPTH = 4
SHARES = (100, 75, 50, 35, 25)
"""Percent of the blocks that the search holds when it has all it likes."""
FORMS = {"moved to host memory": None, "computed again": 0}
"""What becomes of K/V that leaves the pool -> `swap_memory`."""

Paths = list[list[int]]


def bench_pressure(
    model: str, *, width: int, num_tokens: int, num_rounds: int, dtype: str, progress: Progress
) -> Result:
    """Run a beam search that keeps every branch it ever made, in pools of all sizes in turns.

    Raises:
        ModelError, RequestError: as `Engine.load` does.
    """
    sitting = Sitting("pressure")
    with Engine.load(model, dtype=dtype) as engine:
        progress("measuring how much memory the search takes")
        warm_up(engine)
        wanted = _search(engine, width, num_tokens)
        stats = engine.stats()
        name, block_size = engine.name, engine.config.block_size
    shares = _shares(wanted, stats.blocks_peak, block_size)
    found: dict[str, list[Paths]] = {}
    runs: dict[str, Run] = {}
    for form, swap_memory in FORMS.items():
        for share in shares:
            kv_memory = (stats.blocks_peak * share // 100 + 1) * stats.block_bytes  # and the trash block
            load = partial(Engine.load, model, dtype=dtype, kv_memory=kv_memory, swap_memory=swap_memory)
            label = f"{form}: {share} %"
            runs[label] = partial(_timed, load, width, num_tokens, found.setdefault(label, []))
    samples = take_turns(runs, num_rounds=num_rounds, progress=progress, workload=f"{width} wide, {DEPTH} deep")
    figures = [
        shown
        for label in runs
        for shown in _figures(label, samples[label]["search"], samples[label]["moved"], _share(found[label], wanted))
    ]
    shape = f"{dtype}; a beam {width} wide and {DEPTH} deep, {num_tokens} tokens a step at temperature 0.8"
    memory = f"no branch pruned: {stats.blocks_peak} blocks of {stats.block_bytes:,} bytes at most"
    notes = [f"{shape}, {memory}"]
    if left_out := [f"{share} %" for share in SHARES if share not in shares]:
        notes.append(f"{' and '.join(left_out)} would not hold a single branch: give a greater --width")
    return sitting.result(name, figures, notes)


def draw_pressure(result: Result, path: Path) -> None:
    """The search's time against its memory, as a picture.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - optional, and slow to import
        from matplotlib.figure import Figure as Picture  # noqa: PLC0415 - as above
    except ImportError as error:
        raise PlotError("matplotlib is not installed: pip install 'dendrite-engine[bench]'") from error
    picture = Picture(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    times = [figure for figure in result.figures if figure.name == "search"]
    for form, colour in zip(FORMS, ("#1b7f5c", "#4c72b0"), strict=True):
        points = [figure for figure in times if figure.workload.startswith(form)]
        shares = [_percent(figure) for figure in points]
        spread = [
            [figure.median - figure.low for figure in points],
            [figure.high - figure.median for figure in points],
        ]
        axes.errorbar(shares, [figure.median for figure in points], spread, marker="o", capsize=3, label=form, c=colour)
    axes.invert_xaxis()
    axes.set_ylim(bottom=0)
    axes.set_xticks(SHARES)
    axes.set_xlabel("K/V memory, % of what the search would take")
    axes.set_ylabel("time of the search, s")
    axes.set_title(f"{result.model}, {result.machine.gpu or result.machine.processor}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture.savefig(path, metadata=NOTHING_BUT_THE_PICTURE)


def _shares(paths: Paths, num_blocks: int, block_size: int) -> list[int]:
    """The shares of the search's blocks in which its longest branch fits, with the token that scores it."""
    least = -(-(max(map(len, paths)) + 1) // block_size) + DEPTH + 1  # each fork on its path may copy a shared block
    return [share for share in SHARES if num_blocks * share // 100 >= least]


def _percent(found: Figure) -> int:
    return int(found.workload.partition(": ")[2].split()[0])


def _figures(label: str, seconds: Sequence[float], moved: Sequence[float], share: float) -> Iterator[Figure]:
    yield figure(label, "dendrite", "search", "s", seconds, note=f"{share:.0%} of the branches have the same tokens")
    yield figure(label, "dendrite", "tokens that left the pool", "tokens", moved)


def _share(found: Sequence[Paths], wanted: Paths) -> float:
    """How many of all branches have the tokens that they have with all the memory they like."""
    same = sum(path == other for paths in found for path, other in zip(paths, wanted, strict=True))
    return same / (len(found) * len(wanted))


def _timed(load: partial[Engine], width: int, num_tokens: int, found: list[Paths]) -> Mapping[str, float]:
    with load() as engine:
        warm_up(engine)
        before = engine.stats().tokens_swapped_out
        began = time.perf_counter()
        found.append(_search(engine, width, num_tokens))
        seconds = time.perf_counter() - began
        return {"search": seconds, "moved": engine.stats().tokens_swapped_out - before}


def _search(engine: Engine, width: int, num_tokens: int) -> Paths:
    """What every branch says in the end, those that the beam let go of too."""
    frontier = [engine.root(PROMPT, seed=7)]
    made: list[Branch] = list(frontier)
    for _ in range(DEPTH):
        kids = [kid for parent in frontier for kid in parent.fork(width // len(frontier))]
        for kid in kids:
            kid.append("\nStep:")
        engine.generate(kids, max_tokens=num_tokens, temperature=0.8, ignore_eos=True)
        for kid in kids:
            kid.value = kid.score([" good"])[0]
        frontier = sorted(kids, key=lambda kid: -(kid.value or 0.0))[: max(1, width // 4)]
        made += kids
    return [branch.token_ids for branch in made]
