"""`dendrite bench`: measurements on this machine, beside other engines in the same run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dendrite.cli import suite
from dendrite.cli.console import errors_shown
from dendrite.cli.progress import progress_line
from dendrite.cli.suite import Device, Shape, lengths

if TYPE_CHECKING:  # the command line starts without it
    from dendrite.bench.figures import Result

app = typer.Typer(help="Measure the engine on this machine.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="A short name, a hub id or a folder.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", dir_okay=False)]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Rounds = Annotated[int, typer.Option(min=1, help="Repetitions, in turns.")]
Branches = Annotated[int, typer.Option(min=1, help="Branches that decode together.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens of each branch.")]
DEFAULT_MODEL = "smollm2-135m-instruct"


@app.callback()
def bench() -> None:
    """Measure the engine on this machine. Nothing else should be running."""


@app.command()
def fork(
    model: Model = DEFAULT_MODEL,
    *,
    shape: Shape = None,
    device: Device = "auto",
    batches: Annotated[int, typer.Option(min=1, help="Hundreds of calls for each parent.")] = 20,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time forks and prunes at many lengths and depths, idle and while the engine steps; count blocks."""
    from dendrite.bench.fork import bench_fork
    from dendrite.bench.subject import Subject

    with errors_shown():
        subject = Subject(None if shape else model, shape, device=device)
        with progress_line() as progress:
            result = bench_fork(subject, num_batches=batches, progress=progress)
        _show(result, json_file, markdown=markdown)


@app.command()
def tree(
    model: Model = DEFAULT_MODEL,
    *,
    branches: Annotated[int, typer.Option(min=1, help="Branches over the prompt.")] = 32,
    tokens: Tokens = 64,
    prefix: Annotated[str, typer.Option(help="Lengths of the prompt, with commas.")] = "512,2048",
    dtype: Dtype = "bfloat16",
    peer: Annotated[
        list[str] | None, typer.Option(help="hf, llama.cpp or none; may be given twice. Without it: hf.")
    ] = None,
    peer_python: Annotated[
        str | None, typer.Option(help="The interpreter of the environment that has llama-cpp-python.")
    ] = None,
    gguf: Annotated[str | None, typer.Option(help="The file that llama.cpp runs, if not the model's own.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each engine, in turns.")] = 3,
    busy: Annotated[bool, typer.Option("--busy", help="Also beside a busy thread and a busy process.")] = False,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Decode many branches over one prompt, beside Transformers and llama.cpp."""
    from dendrite.bench.tree import TreeSettings, bench_tree

    settings = TreeSettings(
        num_branches=branches,
        num_tokens=tokens,
        prefixes=_prefixes(prefix),
        dtype=dtype,
        peers=tuple(name for name in peer or ["hf"] if name != "none"),
        peer_python=peer_python,
        gguf=gguf,
        num_rounds=rounds,
        busy=busy,
    )
    with errors_shown():
        with progress_line() as progress:
            result = bench_tree(model, settings, progress=progress)
        _show(result, json_file, markdown=markdown)


@app.command()
def attention(
    *,
    shape: Annotated[str, typer.Option(help="Whose heads: 8b, 1b, 0.6b or tiny.")] = "8b",
    device: Device = "auto",
    prefix: Annotated[str, typer.Option(help="Lengths of shared prefixes, with commas.")] = "1024,8192,32768",
    branches: Annotated[str, typer.Option(help="Numbers of branches, with commas.")] = "8,32,64,128",
    leaf: Annotated[int, typer.Option(min=1, help="Tokens of its own that a branch has.")] = 64,
    chunk: Annotated[int, typer.Option(min=0, help="Rows of prompts' chunks, on a GPU; 0 leaves them out.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each tree.")] = 7,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time the attention of one layer over trees of many shapes; on a GPU over prompts too, beside FlashInfer's."""
    from dendrite.bench.attention import AttentionSettings, bench_attention
    from dendrite.bench.subject import Subject

    with errors_shown():
        settings = AttentionSettings(
            shape=shape,
            device_type=Subject(shape=shape, device=device).device_type,
            prefixes=_prefixes(prefix),
            branches=_prefixes(branches),
            leaf=leaf,
            chunk=chunk,
            num_rounds=rounds,
        )
        with progress_line() as progress:
            result = bench_attention(settings, progress=progress)
        _show(result, json_file, markdown=markdown)


@app.command()
def constraints(
    model: Model = DEFAULT_MODEL,
    *,
    branches: Branches = 32,
    tokens: Tokens = 32,
    dtype: Dtype = "bfloat16",
    rounds: Rounds = 5,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time constrained steps beside free ones, and what forced tokens save."""
    from dendrite.bench.constraints import bench_constraints

    with errors_shown():
        with progress_line() as progress:
            result = bench_constraints(
                model, num_branches=branches, num_tokens=tokens, num_rounds=rounds, dtype=dtype, progress=progress
            )
        _show(result, json_file, markdown=markdown)


@app.command()
def search(
    model: Model = DEFAULT_MODEL,
    *,
    nodes: Annotated[int, typer.Option(min=100, help="Nodes of the searches without a model.")] = 1000,
    irregular: Annotated[int, typer.Option(min=8, help="Nodes of the search on the model.")] = 120,
    dtype: Dtype = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of the searches without a model.")] = 3,
    svg: Annotated[Path | None, typer.Option(help="Draw the rows of each step here.", dir_okay=False)] = None,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time strategies without a model, and look at how full the batches of a lopsided search are."""
    from dendrite.bench.search import bench_search

    with errors_shown():
        with progress_line() as progress:
            result = bench_search(
                model,
                num_nodes=nodes,
                num_irregular=irregular,
                num_rounds=rounds,
                dtype=dtype,
                svg=svg,
                progress=progress,
            )
        _show(result, json_file, markdown=markdown)


@app.command()
def pressure(
    model: Model = DEFAULT_MODEL,
    *,
    width: Annotated[int, typer.Option(min=4, help="Children of each round of the search.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step of the search.")] = 24,
    dtype: Dtype = "float32",
    rounds: Rounds = 3,
    svg: Annotated[Path | None, typer.Option(help="Draw time against memory here.")] = None,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time a search in all the memory it likes, and in less and less of it."""
    from dendrite.bench.pressure import bench_pressure, draw_pressure

    with errors_shown():
        with progress_line() as progress:
            result = bench_pressure(
                model, width=width, num_tokens=tokens, num_rounds=rounds, dtype=dtype, progress=progress
            )
        if svg is not None:
            draw_pressure(result, svg)
        _show(result, json_file, markdown=markdown)


@app.command()
def integrity(
    model: Model = DEFAULT_MODEL,
    *,
    branches: Branches = 32,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens they share.")] = 512,
    tokens: Tokens = 32,
    dtype: Dtype = "bfloat16",
    rounds: Rounds = 7,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time a step with each integrity mode."""
    from dendrite.bench.integrity import bench_integrity

    with errors_shown():
        with progress_line() as progress:
            result = bench_integrity(
                model,
                num_branches=branches,
                prefix=prefix,
                num_tokens=tokens,
                num_rounds=rounds,
                dtype=dtype,
                progress=progress,
            )
        _show(result, json_file, markdown=markdown)


suite.add_to(app, DEFAULT_MODEL)


def _prefixes(text: str) -> tuple[int, ...]:
    if not text:
        raise typer.BadParameter("give a prefix, such as 512,2048")
    return lengths(text)


def _show(result: Result, json_file: Path | None, *, markdown: bool) -> None:
    from rich.console import Console

    from dendrite.bench.table import as_markdown, as_table

    if json_file is not None:
        json_file.write_text(json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if markdown:
        print(as_markdown(result))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(as_table(result))
    for note in result.notes:
        console.print(f"· {note}", highlight=False, markup=False)
