"""`dendrite`: one application, one module for each command.

    main.py ──► demo.py        dendrite demo
            ├─► models.py      dendrite models list | fetch | remove
            ├─► verify.py      dendrite verify
            ├─► bench.py       dendrite bench fork | tree, suite.py the other workloads
            └─► ...            a command adds itself with one line below

A command's module imports nothing heavy at its top, and puts `with errors_shown():` around its work.
"""

from __future__ import annotations

import typer

from dendrite.cli import bench, demo, models, verify

app = typer.Typer(
    name="dendrite",
    help="An LLM engine for agents that search.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.add_typer(models.app, name="models")
app.command()(verify.verify)
app.add_typer(bench.app, name="bench")


@app.callback()
def main() -> None:
    """Keep `dendrite COMMAND` the form even while there is one command only."""
