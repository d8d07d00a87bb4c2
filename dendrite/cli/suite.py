"""`dendrite bench decode`, `fanout` … and `all`: the suite's cases, one command a workload."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dendrite.cli.console import errors_shown

if TYPE_CHECKING:  # the command line starts without it
    from dendrite.bench.figures import Result
    from dendrite.bench.suite import SuiteSettings

ABOUT = {
    "decode": "Time of a decode step at several batch sizes.",
    "fanout": "Branches that decode over one warm prefix.",
    "first-token": "From a warm parent to its children's first tokens.",
    "tot": "A Tree of Thoughts search, breadth first.",
    "mcts": "A Monte Carlo tree search, one iteration after the other.",
    "score": "Log-probabilities of several continuations of one prefix.",
    "memory": "K/V held by branches, beside what separate requests would hold.",
    "all": "The whole suite, forks included, and a short table at the end.",
}
RESULTS = "results"
"""Name of the files in the output folder, without their endings."""

Shape = Annotated[str | None, typer.Option(help="8b, 1b, 0.6b or tiny: random weights instead of a model.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
OutputFolder = Annotated[
    Path | None, typer.Option("--output", help="Write results.json (as they come), .md, .svg and .png here.")
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peer", help="hf, llama.cpp, vllm or sglang; NAME=PLACE if a folder or another Python has it. Repeatable."
    ),
]


def add_to(app: typer.Typer, default_model: str) -> None:
    """Add the suite's commands to `dendrite bench`."""
    for name, about in ABOUT.items():
        app.command(name, help=about)(_command(name, default_model))
    app.command("plot")(plot)


def _command(name: str, default_model: str) -> Callable[..., None]:
    def run(
        *,
        model: Annotated[str | None, typer.Option(help="A short name, a hub id or a folder.")] = None,
        shape: Shape = None,
        device: Device = "auto",
        dtype: Annotated[str, typer.Option(help="float32 or bfloat16, everybody's.")] = "bfloat16",
        kv_memory: Annotated[str | None, typer.Option(help="Of this engine's K/V, such as 8GiB.")] = None,
        peer: Peers = None,
        gguf: Annotated[str | None, typer.Option(help="The file that llama.cpp runs, if not the model's own.")] = None,
        size: Annotated[str | None, typer.Option(help="full, small or tiny; without it by the device.")] = None,
        prefix: Annotated[str, typer.Option(help="Lengths of shared prefixes, with commas.")] = "",
        branches: Annotated[str, typer.Option(help="Numbers of branches, with commas.")] = "",
        batch: Annotated[str, typer.Option(help="Batch sizes of decode, with commas.")] = "",
        tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of each branch.")] = None,
        rounds: Annotated[int, typer.Option(min=1, help="Repetitions; first-token takes eight times as many.")] = 3,
        only: Annotated[str, typer.Option(help="Of all: these workloads, with commas.")] = "",
        skip: Annotated[str, typer.Option(help="Of all: not these workloads, with commas.")] = "",
        output: OutputFolder = None,
        markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    ) -> None:
        from dendrite.bench.sizes import SIZES
        from dendrite.bench.subject import Subject
        from dendrite.bench.suite import SuiteSettings

        with errors_shown():
            chosen = None if shape else model or default_model
            subject = Subject(chosen, shape, device=device, dtype=dtype, kv_memory=kv_memory)
            if model and shape:
                raise typer.BadParameter("give --model or --shape: one of the two")
            usual = "full" if subject.device_type == "cuda" else "small"
            if (size or usual) not in SIZES:
                raise typer.BadParameter(f"there is no size {size!r}: give {', '.join(SIZES)}")
            sizes = SIZES[size or usual].with_lengths(
                prefixes=lengths(prefix), branches=lengths(branches), batches=lengths(batch), tokens=tokens
            )
            settings = SuiteSettings(_workloads(name, only, skip), sizes, tuple(peer or ()), gguf, num_rounds=rounds)
            _run(subject, settings, output, markdown=markdown)

    return run


def plot(
    results: Annotated[Path, typer.Argument(help="A results.json.", exists=True, dir_okay=False)],
) -> None:
    """Draw the pictures of an earlier run beside its results.json."""
    from dendrite.bench.figures import Result
    from dendrite.bench.plot import draw

    with errors_shown():
        try:
            result = Result.from_json(json.loads(results.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise typer.BadParameter(f"{results} holds no results of dendrite bench ({error})") from error
        for path in draw(result, results.parent, results.stem):
            print(path)


def lengths(text: str) -> tuple[int, ...]:
    """Whole numbers, with commas between them.

    Raises:
        typer.BadParameter: something else.
    """
    try:
        found = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list of lengths: give such as 512,2048") from error
    if found and min(found) < 1:
        raise typer.BadParameter(f"{text!r}: a length is 1 or more")
    return found


def _workloads(name: str, only: str, skip: str) -> tuple[str, ...]:
    from dendrite.bench.cases import WORKLOADS, check_workloads

    if name != "all":
        return (name,)
    wanted = tuple(filter(None, only.split(","))) or WORKLOADS
    unwanted = tuple(filter(None, skip.split(",")))
    check_workloads(wanted + unwanted)
    return tuple(workload for workload in WORKLOADS if workload in wanted and workload not in unwanted)


def _run(subject: object, settings: SuiteSettings, output: Path | None, *, markdown: bool) -> None:
    from rich.console import Console

    from dendrite.bench.subject import Subject
    from dendrite.bench.suite import run_suite
    from dendrite.bench.table import as_comparison, as_markdown_comparison
    from dendrite.cli.progress import progress_line

    assert isinstance(subject, Subject)

    def keep(result: Result) -> None:
        if output is not None:
            _write(output / f"{RESULTS}.json", json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n")
            _write(output / f"{RESULTS}.md", as_markdown_comparison(result) + "\n")

    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    with progress_line() as progress:
        result = run_suite(subject, settings, progress=progress, keep=keep)
    if output is not None:
        _draw(result, output)
    if markdown:
        print(as_markdown_comparison(result))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for note in result.notes:
        console.print(f"· {note}", highlight=False, markup=False)
    console.print(as_comparison(result))


def _write(path: Path, text: str) -> None:
    """All of it or nothing: the run may be cut short at any moment."""
    partial = path.with_suffix(f"{path.suffix}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _draw(result: Result, output: Path) -> None:
    from dendrite.bench.plot import PlotError, draw

    try:
        draw(result, output, RESULTS)
    except PlotError as error:
        print(f"no picture: {error}", file=sys.stderr)
