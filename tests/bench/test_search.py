"""`dendrite bench search` from end to end on a tiny model; no test here looks at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

from typer.testing import CliRunner

from dendrite.bench.occupancy import Stretch, by_step, draw_occupancy
from dendrite.cli.main import app


def test_search_times_strategies_and_watches_batches(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Every strategy has its figures; several expansions at a time fill the batches more than one does."""
    file, picture = tmp_path / "search.json", tmp_path / "search.svg"
    command = ["bench", "search", str(tiny_folder("llama")), "--nodes", "100", "--irregular", "32", "--rounds", "1"]
    command += ["--dtype", "float32", "--json", str(file), "--svg", str(picture)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    timed = {figure["engine"].partition("(")[0] for figure in figures if figure["name"] == "strategy, a node"}
    assert timed == {"Beam", "DepthFirst", "BestFirst", "MCTS", "LATS", "BestOfN", "AdaptiveBranching"}
    rows = [figure["median"] for figure in figures if figure["name"] == "rows a step"]
    steps = [figure["median"] for figure in figures if figure["name"] == "steps"]
    assert len(rows) == len(steps) == 3
    assert rows[0] < min(rows[1:])
    assert ET.parse(picture).getroot().tag.endswith("svg")  # noqa: S314 - we wrote it


def test_a_picture_shows_every_run(tmp_path: Path) -> None:
    """A panel each; a stretch of several steps is spread over them."""
    assert by_step([Stretch(2, 8), Stretch(1, 5)]) == [4, 4, 5]
    path = tmp_path / "occupancy.svg"
    draw_occupancy({"one <at> a time": [Stretch(3, 9)], "eight": [Stretch(2, 8), Stretch(1, 5)]}, path)
    texts = [node.text or "" for node in ET.parse(path).getroot().iter() if node.tag.endswith("text")]  # noqa: S314 - we wrote it
    assert any(text.startswith("one <at> a time: 3.0 rows a step, 3 steps") for text in texts)
    assert any(text.startswith("eight: 4.3 rows a step, 3 steps") for text in texts)
