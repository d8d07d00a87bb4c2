"""The commands from end to end on a tiny model; no test here looks at a time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dendrite.bench.tree import TreeSettings, bench_tree
from dendrite.cli.main import app
from dendrite.engine.engine import Engine


def test_fork_measures_lengths_depths_and_blocks(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Every length and depth that fits is measured, idle and stepping; children hold nothing until they diverge."""
    file = tmp_path / "fork.json"
    command = ["bench", "fork", str(tiny_folder("llama")), "--batches", "2", "--json", str(file)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    found = {(figure["workload"], figure["name"]): figure for figure in figures}
    for state in ("idle", "stepping"):
        for parent in ("128 tokens", "depth 1", "depth 10", "depth 100"):
            assert found[f"{parent}, {state}", "fork"]["num_samples"] == 2
            assert found[f"{parent}, {state}", "prune"]["median"] > 0
        assert (f"all depths, {state}", "slowest ÷ fastest fork") in found
    assert found["stepping", "steps meanwhile"]["median"] > 0
    children = "64 children of 128 tokens"
    assert found[children, "blocks of their own, just forked"]["median"] == 0
    assert found[children, "blocks each, diverged"]["median"] <= 1
    assert "128 tokens, idle" in result.stdout


def test_constraints_measures_overhead_and_forced_runs(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Free and constrained branches take the same steps; a record with fixed keys takes fewer than free text."""
    file = tmp_path / "constraints.json"
    command = ["bench", "constraints", str(tiny_folder("llama")), "--branches", "2", "--tokens", "3", "--rounds", "2"]
    command += ["--dtype", "float32", "--json", str(file)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    found = {(figure["engine"], figure["name"]): figure for figure in figures}
    for kind in ("JSON strings", "letters"):
        assert found[kind, "step"]["num_samples"] == found[kind, "constrained ÷ free step"]["num_samples"] == 2
    assert found["fixed keys", "steps"]["median"] < found["free", "steps"]["median"] / 2
    assert found["fixed keys", "free ÷ constrained time"]["note"].endswith("% forced")


def test_tree_runs_beside_transformers(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of Transformers run in their own processes; their figures stand beside ours with a ratio."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the peers: on two busy cores their threads would only wait
    settings = TreeSettings(num_branches=3, num_tokens=4, prefixes=(8, 24), dtype="float32", num_rounds=2, busy=True)
    result = bench_tree(str(tiny_folder("llama")), settings, progress=lambda _: None)
    workloads = list(dict.fromkeys(figure.workload for figure in result.figures))
    assert workloads == ["3 × 4 over 8", "3 × 4 over 24", "1 × 4 over 8"]
    for workload in workloads:
        ours = [figure for figure in result.figures if (figure.workload, figure.engine) == (workload, "dendrite")]
        assert {"prefill", "decode", "whole"} <= {figure.name for figure in ours}
        for engine in ("hf generate", "hf static"):
            theirs = [figure for figure in result.figures if (figure.workload, figure.engine) == (workload, engine)]
            assert (
                {"prefill", "decode", "whole"} <= {figure.name for figure in theirs} <= {figure.name for figure in ours}
            )
            assert all(figure.median > 0 and figure.ratio is not None for figure in theirs)
    steps = {figure.engine for figure in result.figures if figure.name == "step"}
    assert steps == {"dendrite, quiet", "dendrite, busy process", "dendrite, busy thread"}


def test_peer_that_cannot_run_is_left_out_with_a_note(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Without llama.cpp, or with a file it cannot read, the others are still measured."""
    settings = TreeSettings(
        num_branches=1,
        num_tokens=2,
        prefixes=(8,),
        dtype="float32",
        peers=("llama.cpp",),
        gguf=str(tmp_path / "none.gguf"),
        num_rounds=1,
    )
    result = bench_tree(str(tiny_folder("llama")), settings, progress=lambda _: None)
    assert {figure.engine for figure in result.figures} == {"dendrite"}
    assert any(note.startswith("left out: llama.cpp") for note in result.notes)


def test_tree_leaves_nothing_in_the_engine(tiny_folder: Callable[[str], Path]) -> None:
    """A repetition computes its prompt anew each time, since the one before gave everything back."""
    from dendrite.bench.ours import run_tree
    from dendrite.bench.peers.protocol import TreeTask

    with Engine.load(str(tiny_folder("llama"))) as engine:
        run_tree(engine, TreeTask(list(range(40)), 4, 5, 0.8, 0))
        first = engine.stats()
        run_tree(engine, TreeTask(list(range(40)), 4, 5, 0.8, 0))
        second = engine.stats()
    assert first.blocks_used == second.blocks_used == 0
    assert second.tokens_shared == first.tokens_shared


@pytest.mark.parametrize("lengths", ["512,x", "0", ""])
def test_wrong_lengths_are_refused(lengths: str) -> None:
    """A prefix that is no list of lengths is a usage error, before anything is loaded."""
    result = CliRunner().invoke(app, ["bench", "tree", "--prefix", lengths])
    assert result.exit_code == 2


def test_markdown_is_printed_for_the_documentation(tiny_folder: Callable[[str], Path]) -> None:
    """`--markdown` prints a table that can be pasted as it is."""
    command = ["bench", "tree", str(tiny_folder("llama")), "--branches", "1", "--tokens", "2", "--prefix", "8"]
    command += ["--rounds", "1", "--dtype", "float32", "--markdown", "--peer", "none"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.startswith("| workload | engine | figure |")
