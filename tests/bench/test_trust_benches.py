"""`dendrite bench pressure` and `integrity` on a tiny model: their figures, and a picture of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from dendrite.bench.figures import Result
from dendrite.bench.integrity import MODES, bench_integrity
from dendrite.bench.pressure import SHARES, bench_pressure
from dendrite.cli.main import app


def test_a_search_says_the_same_in_every_size_of_pool(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """All branches have the tokens they have with enough memory, less of it moves more, and the picture is drawn."""
    picture, figures = tmp_path / "pressure.svg", tmp_path / "figures.json"
    command = ["bench", "pressure", str(tiny_folder("llama")), "--width", "8", "--tokens", "6", "--rounds", "1"]
    done = CliRunner().invoke(app, [*command, "--svg", str(picture), "--json", str(figures)])
    assert done.exit_code == 0, done.output
    result = Result.from_json(json.loads(figures.read_text()))
    times = [figure for figure in result.figures if figure.name == "search"]
    moved = [figure.median for figure in result.figures if figure.name != "search"]
    assert len(times) == 2 * len(SHARES)
    assert {figure.note for figure in times} == {"100% of the branches have the same tokens"}
    assert moved[0] < moved[len(SHARES) - 1]
    assert "<svg" in picture.read_text()


def test_pools_too_small_for_a_branch_are_left_out(tiny_folder: Callable[[str], Path]) -> None:
    """A narrow search has no quarter of its memory to run in; the notes say so."""
    result = bench_pressure(
        str(tiny_folder("llama")), width=4, num_tokens=4, num_rounds=1, dtype="float32", progress=lambda _: None
    )
    times = [figure for figure in result.figures if figure.name == "search"]
    assert 0 < len(times) < 2 * len(SHARES)
    assert {figure.note for figure in times} == {"100% of the branches have the same tokens"}
    assert any("25 % would not hold a single branch" in note for note in result.notes)


def test_each_mode_is_timed_beside_none(tiny_folder: Callable[[str], Path]) -> None:
    """A step of each, and the ratios."""
    result = bench_integrity(
        str(tiny_folder("llama")),
        num_branches=3,
        prefix=20,
        num_tokens=4,
        num_rounds=2,
        dtype="float32",
        progress=lambda _: None,
    )
    assert [figure.engine for figure in result.figures] == [*MODES, *MODES[1:]]
    assert all(figure.median > 0 for figure in result.figures)
