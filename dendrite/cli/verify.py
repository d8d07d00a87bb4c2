"""`dendrite verify`: is the engine exact on this machine?"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dendrite.cli.console import errors_shown

if TYPE_CHECKING:  # the command line starts without them
    from rich.table import Table

    from dendrite.verify.report import Report, Row

STYLES = {"ok": "green", "rounding": "yellow", "miss": "bold red"}


def verify(
    model: Annotated[str, typer.Argument(help="A short name, a hub id or a folder.")] = "smollm2-135m-instruct",
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The whole grid of cases: many minutes.")] = False,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the engine runs: cpu, cuda or cuda:1.")] = "cpu",
) -> None:
    """Compare the engine with plain Transformers on this machine; exits with 1 on a miss."""
    with errors_shown():
        from dendrite.cli.progress import progress_line
        from dendrite.verify.oracle import verify as run

        with progress_line() as progress:
            report = run(model, full=full, dtype=dtype, device=device, progress=progress)
        if as_json:
            print(json.dumps(report.to_json(), indent=2))
        else:
            _print(report)
        if not report.ok:
            raise typer.Exit(1)


def _print(report: Report) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_table(report))
    console.print(_summary(report), style=STYLES["ok" if report.ok else "miss"], highlight=False)


def _table(report: Report) -> Table:
    from rich.table import Table

    table = Table(title=f"dendrite verify · {report.model} · {report.dtype}")
    table.add_column("group")
    table.add_column("case")
    table.add_column("tokens equal", justify="right")
    table.add_column("max logit difference", justify="right")
    table.add_column("")
    table.add_column("note", overflow="fold")
    group = ""
    for row in report.rows:
        if group and row.group != group:
            table.add_section()
        table.add_row(*_cells(row, shows_group=row.group != group))
        group = row.group
    return table


def _cells(row: Row, *, shows_group: bool) -> list[str]:
    tokens = f"{row.tokens_equal} / {row.tokens_total}" if row.tokens_total else ""
    difference = f"{row.max_difference:.1e}" if row.tolerance else ""
    style = STYLES[row.verdict]
    return [row.group if shows_group else "", row.case, tokens, difference, f"[{style}]{row.verdict}[/]", row.note]


def _summary(report: Report) -> str:
    counts = f"{len(report.rows)} cases, {len(report.misses)} missed, {len(report.rounded)} decided by rounding"
    return f"{'exact' if report.ok else 'NOT EXACT'}: {counts}, {report.seconds:,.0f} s"
