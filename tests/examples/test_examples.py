"""The examples run on the real model; what they find is checked by code."""

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest

import dendrite as dd
from dendrite.testing import scripted_engine

FOLDER = Path(__file__).parent.parent.parent / "examples"


def load(name: str) -> ModuleType:
    """One example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def engine(real_model_folder: Path) -> Iterator[dd.Engine]:
    with dd.Engine.load(str(real_model_folder)) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats().branches == 0


@pytest.mark.parametrize("name", ["game_of_24", "best_of_n_maths", "self_refine_code", "lats_tools", "mini_crossword"])
def test_search_examples_are_short(name: str) -> None:
    """Each is one file of less than 80 lines."""
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 80


@pytest.mark.parametrize("strategy", [dd.MCTS(4, parallel=3), dd.BestOfN(3, depth=3)], ids=str)
def test_game_of_24_makes_legal_moves(engine: dd.Engine, strategy: dd.Strategy) -> None:
    """Whatever the model chooses, the arithmetic of every path is right."""
    example = load("game_of_24")
    with example.solve(engine, (4, 6, 2, 1), strategy, seed=1) as result:
        for node in list(result.tree)[1:]:
            equation, _, value = node.text.partition("=")
            first, sign, second = equation.split()
            a, b = Fraction(first), Fraction(second)
            done = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign]
            assert done == Fraction(value.strip())
            assert len(node.state.left) == 4 - node.depth
        assert result.usage.tokens_logical > result.usage.tokens_computed


def test_game_of_24_prints_its_table(
    engine: dd.Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row of a search: what was solved, of how many ends, and that the tree computes a fraction of what it reads."""
    monkeypatch.syspath_prepend(FOLDER)
    example = load("game_of_24_table")
    games = example.puzzles(1)
    for expand in (example.model, example.uniform):
        asyncio.run(example.row(engine, expand.__name__, example.searching(expand, dd.MCTS(3)), games))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["model", "uniform"]
    assert all(row[1] in ("0 of 1", "1 of 1") for row in rows)
    computed, logical = (int(cell.replace(",", "")) for cell in rows[0][3:])
    assert 0 < 3 * computed < logical


def test_best_of_n_counts_votes(engine: dd.Engine) -> None:
    """The winner has most votes, and the prompt was computed once."""
    said, votes, usage = load("best_of_n_maths").ask(engine, "What is 17 plus 25?")
    cast = {answer: number for answer, number in votes.items() if answer is not None}
    assert sum(votes.values()) == 16
    assert cast[said] == max(cast.values())
    assert usage.tokens_logical > 3 * usage.tokens_computed


def test_lats_narrows_down_with_its_tool(engine: dd.Engine) -> None:
    """What the tool says is in the transcript and bounds every later guess."""
    example = load("lats_tools")
    with example.program.run(
        engine,
        "Find the hidden number from 1 to 99.",
        state=example.Known(),
        seed=1,
        budget=dd.Budget(nodes=9, tokens=150),
    ) as result:
        for node in list(result.tree)[1:]:
            if node.status in ("open", "pruned"):
                assert node.state.low <= example.HIDDEN <= node.state.high
                assert "Tool: it is" in node.transcript
        assert result.best.depth >= 1


def test_the_crossword_fits(engine: dd.Engine) -> None:
    """Three words across, and every column begins a word."""
    example = load("mini_crossword")
    with example.program.run(engine, "Answer with words of three letters.", state=example.Grid(), seed=3) as result:
        assert result.stopped == "goal"
        rows = result.best.state.rows
    assert len(set(rows)) == 3
    assert all(row in example.WORDS for row in rows)
    assert all("".join(column) in example.WORDS for column in zip(*rows, strict=True))


def test_self_refine_runs_real_tests(engine: dd.Engine) -> None:
    """Every draft of the model was run; what is called passed passes."""
    example = load("self_refine_code")
    with example.program.run(engine, example.TASK, state=example.Code(), seed=1, budget=dd.Budget(nodes=6)) as result:
        drafts = list(result.tree)[1:]
        assert drafts
        assert all("Tests:" in node.transcript for node in drafts)
        assert (result.stopped == "goal") == (result.best.state.failed == 0)


def test_self_refine_ends_when_the_tests_pass() -> None:
    """With a scripted writer: the first draft fails two real tests, its revision none."""
    example = load("self_refine_code")

    def writer(text: str) -> str:
        return "return max(numbers)\n```" if "Tests:" in text else "return max(0, numbers[-1])\n```"

    with (
        scripted_engine(writer) as scripted,
        example.program.run(scripted, example.TASK, state=example.Code(), seed=1) as result,
    ):
        assert result.stopped == "goal"
        assert result.best.depth == 2
        assert result.best.path[1].state.failed == 2
