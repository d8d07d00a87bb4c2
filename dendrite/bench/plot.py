"""A result as a picture: a panel a workload, a group of bars a case, the floor as a line across each group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dendrite.bench.figures import Figure, Result
from dendrite.engine.errors import DendriteError

if TYPE_CHECKING:  # optional
    from matplotlib.axes import Axes

COLOURS = {"dendrite": "#1b7f5c", "vllm": "#e0a030", "sglang": "#4c72b0", "hf": "#8c8c8c", "llama.cpp": "#a0522d"}
OTHER = "#c44e52"
WIDTH = 0.8
"""Of a group of bars; groups stand 1 apart."""
NOTHING_BUT_THE_PICTURE = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""Metadata of an SVG: none, so that a picture drawn again is the same file and names no other site."""


class PlotError(DendriteError):
    """Nothing can be drawn here; the message says what to do."""


def draw(result: Result, folder: Path, name: str) -> list[Path]:
    """Write `name`.svg and `name`.png.

    Raises:
        PlotError: matplotlib is not installed, or there is nothing to draw.
    """
    panels = _panels(result.figures)
    if not panels:
        raise PlotError("there are no figures yet")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - optional, and slow to import
        from matplotlib.figure import Figure as Picture  # noqa: PLC0415 - as above
    except ImportError as error:
        raise PlotError("matplotlib is not installed: pip install 'dendrite-engine[bench]'") from error
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    picture = Picture(figsize=(6.4 * columns, 3.2 * rows + 0.8), layout="constrained")
    FigureCanvasAgg(picture)
    for index, (workload, figures) in enumerate(panels.items()):
        _panel(picture.add_subplot(rows, columns, index + 1), workload, figures)
    picture.suptitle(f"{result.model}\n{result.machine.gpu or result.machine.processor}", fontsize=11)
    vector, raster = folder / f"{name}.svg", folder / f"{name}.png"
    picture.savefig(vector, metadata=NOTHING_BUT_THE_PICTURE)
    picture.savefig(raster, dpi=150)
    return [vector, raster]


def _panels(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    """Workload -> its figures, without those in units of their own."""
    panels: dict[str, list[Figure]] = {}
    for figure in figures:
        workload, separator, _ = figure.workload.partition(": ")
        if separator and figure.unit in {"ms", "MB"}:
            panels.setdefault(workload, []).append(figure)
    return panels


def _panel(axes: Axes, workload: str, figures: Sequence[Figure]) -> None:
    """Bars of every engine side by side; a second figure of one engine (memory) counts as one more engine."""
    cases = list(dict.fromkeys(figure.workload for figure in figures))
    main = figures[0].name
    series: dict[str, dict[str, Figure]] = {}
    for figure in figures:
        label = figure.engine if figure.name == main else f"{figure.name}"
        series.setdefault(label, {})[figure.workload] = figure
    width = WIDTH / len(series)
    for number, (label, found) in enumerate(series.items()):
        places = [cases.index(case) - WIDTH / 2 + (number + 0.5) * width for case in found]
        heights = [figure.median for figure in found.values()]
        bars = axes.bar(places, heights, width * 0.92, label=label, color=COLOURS.get(label, OTHER))
        axes.bar_label(bars, labels=[_short(height) for height in heights], fontsize=6.5, padding=1)
    _floors(axes, cases, figures)
    axes.set_title(f"{workload} ({main}, {figures[0].unit}; less is better)", fontsize=9)
    axes.set_xticks(range(len(cases)), [_wrapped(case.partition(": ")[2]) for case in cases], fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.yaxis.set_major_formatter("{x:,.0f}" if axes.get_ylim()[1] >= 1000 else "{x:.4g}")
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)


def _floors(axes: Axes, cases: Sequence[str], figures: Sequence[Figure]) -> None:
    floors = {figure.workload: figure.floor for figure in figures if figure.floor}
    for number, (case, floor) in enumerate(floors.items()):
        place = cases.index(case)
        axes.hlines(
            floor,
            place - WIDTH / 2,
            place + WIDTH / 2,
            colors="black",
            linestyles="dashed",
            linewidth=1.2,
            label="floor" if number == 0 else "_",
        )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _wrapped(title: str) -> str:
    """On two lines, so that neighbours do not meet."""
    for word in (" over ", " of ", " after ", ", "):
        if word in title:
            head, _, tail = title.partition(word)
            return f"{head}\n{word.strip()} {tail}".replace("\n, ", ",\n")
    return title
