"""`dendrite bench search`: what searching costs beside the model, and how full its batches are."""

from __future__ import annotations

from pathlib import Path

from dendrite.bench.figures import Result
from dendrite.bench.occupancy import draw_occupancy, occupancy_figures
from dendrite.bench.ours import warm_up
from dendrite.bench.overhead import overhead_figures
from dendrite.bench.rounds import Progress
from dendrite.bench.sitting import Sitting
from dendrite.engine.engine import Engine

PARALLEL = (1, 8, 24)
"""Expansions under way at the same time."""


def bench_search(
    model: str,
    *,
    num_nodes: int,
    num_irregular: int,
    num_rounds: int,
    dtype: str,
    svg: Path | None,
    progress: Progress,
) -> Result:
    """Time strategies without a model; then search an irregular tree on the model, an expansion at a time and several.

    Args:
        model: of the second half.
        num_nodes: of each search without a model.
        num_irregular: of the searches on the model.
        num_rounds: repetitions of those without a model.
        dtype: of the model.
        svg: where to draw the rows of each step.
        progress: told what runs now.

    Raises:
        ModelError, RequestError: as `Engine.load` does.
    """
    sitting = Sitting("search")
    figures = list(overhead_figures(num_nodes, num_rounds, progress))
    with Engine.load(model, dtype=dtype) as engine:
        progress("warming up")
        warm_up(engine)
        found, runs = occupancy_figures(engine, num_nodes=num_irregular, parallel=PARALLEL, progress=progress)
        figures += found
        name = engine.name
    if svg is not None:
        draw_occupancy(runs, svg)
    return sitting.result(name, figures, ["without a model: children that code makes, a score that hashes their text"])
