"""`dendrite models`: what models there are, what of them is on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from dendrite.cli.console import errors_shown, megabytes

if TYPE_CHECKING:  # the command line starts without it
    from dendrite.engine.registry import Listing

app = typer.Typer(help="List, fetch and remove models.", invoke_without_command=True)

Name = Annotated[str, typer.Argument(help="A short name from `dendrite models list`, or a hub id (owner/model).")]


@app.callback()
def models(context: typer.Context) -> None:
    """List, fetch and remove models. Without a subcommand: list."""
    if context.invoked_subcommand is None:
        list_models()


@app.command("list")
def list_models(
    *, as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False
) -> None:
    """Show the known short names and what of them is on this machine."""
    from dendrite.engine.registry import ModelStore

    with errors_shown():
        listings = ModelStore().listings()
        if as_json:
            print(json.dumps([_record(listing) for listing in listings], indent=2))
        else:
            _print_table(listings)


@app.command()
def fetch(name: Name) -> None:
    """Bring a model onto this machine, or up to date, or in order if its files are damaged."""
    from dendrite.engine.checkpoint import folder_bytes
    from dendrite.engine.registry import ModelStore

    with errors_shown():
        location = ModelStore().fetch(name)
        print(
            f"{name} is on this machine: {location.path} ({megabytes(folder_bytes(location.path))}, {location.source})"
        )


@app.command()
def remove(
    name: Name,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model from this machine, from the hub's cache as well."""
    from dendrite.engine.registry import ModelStore

    if not yes:
        typer.confirm(f"Remove {name} from this machine, from the hub's cache as well?", abort=True)
    with errors_shown():
        print(f"{name} is removed, {megabytes(ModelStore().remove(name))} are free")


def _record(listing: Listing) -> dict[str, object]:
    location = listing.location
    return {
        "name": listing.model.name,
        "parameters": listing.model.parameters,
        "hub_id": listing.model.repo,
        "cached": location is not None,
        "source": location.source if location is not None else None,
        "path": str(location.path) if location is not None else None,
        "bytes": listing.num_bytes,
    }


def _print_table(listings: list[Listing]) -> None:
    print(_row("name", "parameters", "on disk", "from"))
    for listing in listings:
        location = listing.location
        size = megabytes(listing.num_bytes) if location is not None else "-"
        source = location.source if location is not None else f"hub: {listing.model.repo}"
        print(_row(listing.model.name, listing.model.parameters, size, source))


def _row(name: str, parameters: str, size: str, source: str) -> str:
    return f"{name:<23}{parameters:>10}{size:>10}  {source}"
