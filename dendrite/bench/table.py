"""A result for people: a table on the terminal, or the same in Markdown.

Two forms: one line a figure, and, for the suite, one line a case with the engines side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from dendrite.bench.figures import Figure, Result

HEADINGS = ("workload", "engine", "figure", "median", "range", "unit", "ratio", "goal", "")


def as_table(result: Result) -> Table:
    """The figures as a rich table, its caption naming the machine."""
    table = _empty(result)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in {"median", "range", "ratio"} else "left")
    engines = {figure.engine for figure in result.figures}
    previous = ""
    for figure in result.figures:
        if len(engines) > 1 and previous and figure.workload != previous:
            table.add_section()
        style = "red" if figure.is_met is False else None
        table.add_row(*_cells(figure), style=style)
        previous = figure.workload
    return table


def as_markdown(result: Result) -> str:
    """The figures as a Markdown table, with the machine and the notes below."""
    return _markdown(result, HEADINGS, [_cells(figure) for figure in result.figures])


def as_comparison(result: Result) -> Table:
    """One line a case, the engines side by side."""
    table = _empty(result)
    headings, rows = _side_by_side(result.figures)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in {"case", "figure", "goal"} else "right")
    previous = ""
    for row in rows:
        workload = row[0].partition(":")[0]
        if previous and workload != previous:
            table.add_section()
        table.add_row(*row, style="red" if row[-1].endswith("missed") else None)
        previous = workload
    return table


def as_markdown_comparison(result: Result) -> str:
    """The same as Markdown, with the machine and the notes below."""
    return _markdown(result, *_side_by_side(result.figures))


def _side_by_side(figures: Sequence[Figure]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: ours with its distance from the floor, each peer with how many times as well we did."""
    engines = list(dict.fromkeys(figure.engine for figure in figures))
    found: dict[tuple[str, str], dict[str, Figure]] = {}
    for figure in figures:
        found.setdefault((figure.workload, figure.name), {})[figure.engine] = figure
    has_floor = any(figure.floor for figure in figures)
    headings = ["case", "figure", *engines, *(["floor", "÷ floor"] if has_floor else []), "goal"]
    rows = []
    for (workload, name), by_engine in found.items():
        first = next(iter(by_engine.values()))
        label = f"{name}, {first.unit}" if first.unit else name
        cells = [_beside(by_engine.get(engine)) for engine in engines]
        floor = [number(first.floor), f"{first.median / first.floor:.2f}"] if first.floor else ["", ""]
        rows.append([workload, label, *cells, *(floor if has_floor else []), _verdict(first)])
    return headings, rows


def _beside(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return number(figure.median) + (f" ({figure.ratio:.2f}×)" if figure.ratio is not None else "")


def _verdict(figure: Figure) -> str:
    if figure.is_met is None:
        return figure.goal
    return f"{figure.goal.removesuffix(figure.unit).strip()} {'met' if figure.is_met else 'missed'}"


def _empty(result: Result) -> Table:
    return Table(title=f"dendrite bench {result.benchmark} · {result.model}", caption=str(result.machine))


def _markdown(result: Result, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_line(headings), _line(["---"] * len(headings)), *map(_line, rows)]
    lines += ["", f"`{result.model}` on {result.machine}; {result.seconds:,.0f} s in all."]
    lines += [f"- {note}" for note in result.notes]
    return "\n".join(lines)


def _cells(figure: Figure) -> list[str]:
    spread = f"{number(figure.low)} to {number(figure.high)}" if figure.num_samples > 1 else ""
    ratio = f"{figure.ratio:.2f}×" if figure.ratio is not None else ""
    verdict = {True: "met", False: "missed", None: ""}[figure.is_met]
    last = "; ".join(part for part in (verdict, figure.note) if part)
    return [
        figure.workload,
        figure.engine,
        figure.name,
        number(figure.median),
        spread,
        figure.unit,
        ratio,
        figure.goal,
        last,
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def number(value: float) -> str:
    """Three digits or more, and no more than anybody reads."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
