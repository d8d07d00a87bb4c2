"""A result for people: a table on the terminal, or the same in Markdown."""

from __future__ import annotations

from rich.table import Table

from dendrite.bench.figures import Figure, Result

HEADINGS = ("workload", "engine", "figure", "median", "range", "unit", "ratio", "goal", "")


def as_table(result: Result) -> Table:
    """The figures as a rich table, its caption naming the machine."""
    table = Table(title=f"dendrite bench {result.benchmark} · {result.model}", caption=str(result.machine))
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
    lines = [_line(HEADINGS), _line(["---"] * len(HEADINGS)), *(_line(_cells(figure)) for figure in result.figures)]
    lines += ["", f"`{result.model}` on {result.machine}; {result.seconds:,.0f} s in all."]
    lines += [f"- {note}" for note in result.notes]
    return "\n".join(lines)


def _cells(figure: Figure) -> list[str]:
    spread = f"{_number(figure.low)} to {_number(figure.high)}" if figure.num_samples > 1 else ""
    ratio = f"{figure.ratio:.2f}×" if figure.ratio is not None else ""
    verdict = {True: "met", False: "missed", None: ""}[figure.is_met]
    last = "; ".join(part for part in (verdict, figure.note) if part)
    return [
        figure.workload,
        figure.engine,
        figure.name,
        _number(figure.median),
        spread,
        figure.unit,
        ratio,
        figure.goal,
        last,
    ]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float) -> str:
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
