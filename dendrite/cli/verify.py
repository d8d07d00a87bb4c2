"""`dendrite verify`: is the engine exact on this machine?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
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
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the engine runs: cpu, cuda or cuda:1.")] = "cpu",
    golden: Annotated[Path | None, typer.Option(help="Compare with this folder's golden file instead.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the golden file anew.")] = False,
) -> None:
    """Compare the engine with plain Transformers on this machine; exits with 1 on a miss."""
    if golden is not None or update:
        _golden(model, golden, update=update)
        return
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


def _golden(model: str, folder: Path | None, *, update: bool) -> None:
    """Show how the golden file differs from what is measured now; write it, or exit with 1 if it disagrees."""
    from dendrite.engine.errors import RequestError
    from dendrite.verify.golden import Golden, diff, differences, file_for, measure

    with errors_shown():
        if folder is None:
            raise RequestError("--update needs --golden and a folder")
        path = file_for(folder, model)
        now = measure(model)
        print(diff(path, now) or f"{path}: the same to the last digit")
        if update:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(now.to_json(), encoding="utf-8")
            print(f"{path}: written")
            return
        reasons = differences(Golden.read(path), now)
        for reason in reasons:
            print(f"DIFFERS: {reason}")
        if reasons:
            raise typer.Exit(1)
        print(f"{path}: agrees within {now.tolerance:g}")


def _print(report: Report) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for line in _heading(report):
        console.print(line, highlight=False)
    console.print(_table(report))
    console.print(_summary(report), style=STYLES["ok" if report.ok else "miss"], highlight=False)


def _heading(report: Report) -> list[str]:
    """What it was made with and what is allowed, before anything is compared."""
    lines = []
    if report.pins is not None:
        pins = report.pins
        lines.append(f"weights {pins.weights_sha256[:16]}, tokenizer {pins.tokenizer_sha256[:16]}")
        lines.append(f"Transformers {pins.transformers}, PyTorch {pins.torch}, seed {pins.seed}")
    return [*lines, *(f"{what} allowed: {allowed}" for what, allowed in report.tolerances.items())]


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
