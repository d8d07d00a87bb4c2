"""`dendrite bench search`, second half: how full the engine's batches are over a search of an irregular tree.

Paths go as deep as chance has it and steps are of 1 to 24 tokens: who is done first is scored first, and what a told
result frees joins the next step.

    rows  ▁▅███▇████▇███▆█████▇▅▃▁      the wave fills, stays up while there is work, and runs out at the end
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from zlib import crc32

import dendrite as dd
from dendrite.bench.figures import Figure, figure
from dendrite.bench.rounds import Progress
from dendrite.engine.engine import Engine

WIDTH = 4
LONGEST = 24


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps of the engine between two looks at its counters."""

    num_steps: int
    num_rows: int
    """Rows that went through the model in all of them."""


def occupancy_figures(
    engine: Engine, *, num_nodes: int, parallel: Sequence[int], progress: Progress
) -> tuple[list[Figure], dict[str, list[Stretch]]]:
    """Rows in a step, on average and by quarters of the run, for each number of expansions under way."""
    figures: list[Figure] = []
    runs: dict[str, list[Stretch]] = {}
    workload = f"{num_nodes} irregular nodes"
    for number in parallel:
        name = f"BestFirst(…, parallel={number})"
        progress(f"{workload}: {name}")
        stretches = runs[name] = watched(engine, num_nodes, number)
        rows = by_step(stretches)
        figures.append(figure(workload, name, "rows a step", "rows", [statistics.mean(rows)]))
        middle = rows[len(rows) // 4 : -(len(rows) // 4) or None]
        figures.append(figure(workload, name, "rows a step, middle half", "rows", [statistics.mean(middle)]))
        figures.append(figure(workload, name, "steps", "steps", [float(len(rows))]))
    return figures, runs


def watched(engine: Engine, num_nodes: int, parallel: int) -> list[Stretch]:
    """Run the search and look at the engine's counters at each of its events."""
    program = dd.compile(_grow, _value, strategy=dd.BestFirst(num_nodes, parallel=parallel))
    stretches: list[Stretch] = []
    before = engine.stats()
    for event in program.stream(engine, "Tell a story.", seed=1, budget=dd.Budget(nodes=num_nodes)):
        now = engine.stats()
        if now.steps > before.steps:
            stretches.append(Stretch(now.steps - before.steps, now.tokens_computed - before.tokens_computed))
            before = now
        if event.result is not None:
            event.result.close()
    return stretches


def by_step(stretches: Sequence[Stretch]) -> list[float]:
    """Rows of each step; within a stretch they are taken for equal."""
    return [stretch.num_rows / stretch.num_steps for stretch in stretches for _ in range(stretch.num_steps)]


@dd.expand(width=WIDTH, temperature=1.0)
def _grow(node: dd.Node) -> dd.Gen:
    return dd.Gen("\n", max_tokens=1 + _chance(node, "length", LONGEST))


@dd.score
def _value(node: dd.Node) -> float:
    """Chance, with a liking for depth, so that the tree gets deep and lopsided."""
    return _chance(node, "value", 100) + 20.0 * node.depth


def _chance(node: dd.Node, what: str, below: int) -> int:
    return crc32(f"{what}/{node.name}".encode()) % below


# --- the picture ---------------------------------------------------------------------------------------------------

SVG = "http://www.w3.org/2000/svg"
PANEL_WIDTH, PANEL_HEIGHT, MARGIN = 640, 110, 40


def draw_occupancy(runs: dict[str, list[Stretch]], path: Path) -> None:
    """Write an SVG: a panel a run, its steps from left to right, the rows of each as a bar."""
    rows = {name: by_step(stretches) for name, stretches in runs.items()}
    most = max(max(found) for found in rows.values())
    longest = max(len(found) for found in rows.values())
    height = len(rows) * (PANEL_HEIGHT + MARGIN) + MARGIN // 2
    width = PANEL_WIDTH + 2 * MARGIN
    lines = [
        f'<svg xmlns="{SVG}" font-family="sans-serif" font-size="11" viewBox="0 0 {width} {height}">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (name, found) in enumerate(rows.items()):
        base = (number + 1) * (PANEL_HEIGHT + MARGIN) - MARGIN // 4
        bar = PANEL_WIDTH / longest
        points = " ".join(
            f"H{MARGIN + index * bar:.1f} V{base - value / most * PANEL_HEIGHT:.1f}"
            for index, value in enumerate(found)
        )
        end = MARGIN + len(found) * bar
        title = f"{name}: {statistics.mean(found):.1f} rows a step, {len(found)} steps"
        lines += [
            f'<text x="{MARGIN}" y="{base - PANEL_HEIGHT - 6}">{escape(title)}</text>',
            f'<path d="M{MARGIN} {base} {points} H{end:.1f} V{base} Z" fill="#1b7f5c"/>',
            f'<line x1="{MARGIN}" x2="{MARGIN + PANEL_WIDTH}" y1="{base}" y2="{base}" stroke="black"/>',
            f'<text x="{MARGIN - 6}" y="{base - PANEL_HEIGHT + 8}" text-anchor="end">{most:.0f}</text>',
            f'<text x="{MARGIN - 6}" y="{base}" text-anchor="end">0</text>',
        ]
    path.write_text("\n".join([*lines, "</svg>"]) + "\n", encoding="utf-8")
