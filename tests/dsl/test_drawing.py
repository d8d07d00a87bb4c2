"""Trees as pictures and rows."""

import json
from collections.abc import Iterator
from xml.etree import ElementTree as ET

import pytest

import dendrite as dd
from dendrite.testing import scripted_engine


@pytest.fixture
def result() -> Iterator[dd.Result]:
    @dd.score
    def letters(node: dd.Node) -> float:
        return float(node.transcript.count("<"))

    program = dd.compile(
        dd.expand(cue="\nStep:", width=3, stop="\n"), letters, dd.prune(keep=2), strategy=dd.Beam(depth=2)
    )
    with (
        scripted_engine(lambda text: [' a "quote"\n', " <tag> & a text that is longer than its box\n"]) as engine,
        program.run(engine, "Go.", seed=1) as result,
    ):
        yield result


def test_rows_are_flat(result: dd.Result) -> None:
    """One for each node, with what a data frame needs."""
    rows = result.tree.to_rows()
    assert [row["id"] for row in rows] == [node.id for node in result.tree]
    assert [row["text"] for row in rows if row["on_best_path"]] == [node.text for node in result.path]
    assert {type(value) for row in rows for value in row.values()} <= {int, str, float, bool, type(None)}


def test_the_result_is_data(result: dd.Result) -> None:
    """How it ended, what it took, and the tree."""
    data = json.loads(result.to_json())
    assert data["stopped"] == "done"
    assert data["usage"]["nodes"] == result.usage.nodes == 9
    assert data["best"] == result.best.id
    assert len(data["nodes"]) == 10
    assert result.usage.steps > 0
    assert result.usage.occupancy == result.usage.tokens_computed / result.usage.steps


def test_the_drawing_is_well_formed(result: dd.Result) -> None:
    """Every node has its box, every child its line, and no two boxes overlap."""
    root = ET.fromstring(result.tree.to_svg())  # noqa: S314 - our own
    space = "{http://www.w3.org/2000/svg}"
    boxes = [(float(box.attrib["x"]), float(box.attrib["y"])) for box in root.iter(f"{space}rect")]
    assert len(boxes) == len(set(boxes)) == len(result.tree)
    assert len(list(root.iter(f"{space}line"))) == len(result.tree) - 1
    for x, y in boxes:
        assert all(abs(x - other) >= 132 for other, level in boxes if level == y and other != x)
    titles = [title.text or "" for title in root.iter(f"{space}title")]
    assert any("<tag> & a text that is longer than its box" in title for title in titles)


def test_other_pictures_name_every_node(result: dd.Result) -> None:
    """Graphviz and Mermaid, with quotes and tags escaped."""
    dot, mermaid = result.tree.to_dot(), result.tree.to_mermaid()
    for node in result.tree:
        assert f"n{node.id} [label=" in dot
        assert f'n{node.id}["' in mermaid
    assert dot.count("->") == mermaid.count("-->") == len(result.tree) - 1
    assert dot.count("penwidth") == len(result.path)
    assert '\\"quote\\"' in dot
    assert "<tag>" not in mermaid


def test_a_notebook_shows_it(result: dd.Result) -> None:
    """The best transcript, escaped, and the drawing."""
    shown = result._repr_html_()
    assert "<svg" in shown
    assert "<tag>" not in shown
    assert "9 nodes" in shown
