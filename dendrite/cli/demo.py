"""`dendrite demo`: watch a real model search a tree, beside plain sampling."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dendrite.cli.console import errors_shown


def demo(
    *,
    word: Annotated[str, typer.Option(help="What the first letters of the poem's lines spell.")] = "DENDRITE",
    model: Annotated[str, typer.Option(help="A short name, a hub id or a folder.")] = "smollm2-135m-instruct",
    width: Annotated[int, typer.Option(min=1, help="Tries at the next line of each beginning.")] = 8,
    keep: Annotated[int, typer.Option(min=1, help="Beginnings that go on after each line.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same poems on one machine.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live tree.")] = False,
) -> None:
    """Search for a poem whose every line a program checks; exits with 1 if none is found."""
    with errors_shown():
        import asyncio

        from rich.console import Console

        from dendrite.demo.play import Settings, play
        from dendrite.engine.engine import Engine

        settings = Settings.of(word=word, width=width, keep=keep, seed=seed)
        print(f"loading {model} …", file=sys.stderr, flush=True)
        with Engine.load(model) as engine:
            found = asyncio.run(play(engine, settings, Console(), plain=plain))
        if not found:
            raise typer.Exit(1)
