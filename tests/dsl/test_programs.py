"""The programs of the agreed surface (tests/typing/programs.py) run as they are written."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dendrite as dd
from dendrite.testing import Reply, scripted_engine

SOURCE = Path(__file__).parent.parent / "typing" / "programs.py"


def script(text: str) -> Reply:
    if text.endswith("Step:"):
        return [" 1 + 2 = 3\n", " 4 * 6 = 24\n"]
    return {"yes": 0.5, " yes": 0.2, " sure": 0.2, "no": 0.1}


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    with scripted_engine(script) as engine:
        yield engine
        engine.check_integrity()


@pytest.fixture
def programs(engine: dd.Engine, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file, executed from its first line to its last on the scripted engine; a person always says 1."""
    monkeypatch.setattr(dd.Engine, "load", classmethod(lambda cls, name: contextlib.nullcontext(engine)))
    monkeypatch.setattr("builtins.input", lambda: "1")
    module = ModuleType("surface_programs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(SOURCE.read_text(), str(SOURCE), "exec"), vars(module))  # noqa: S102 - our own file
    return module


def test_every_program_runs(programs: ModuleType, engine: dd.Engine) -> None:
    """Those that the file only compiles are run too; its empty functions are given something to say."""
    names: Any = programs
    names.prm = _rewards
    names.legal = lambda game: ["1 + 3", "2 + 2"] if len(game.left) > 1 else []
    names.play = lambda game, move: names.Game(game.left[1:])
    game = names.Game((4, 9, 10))
    runs = [
        names.dfs.run(engine, "", state=game),
        names.refine.run(engine, "Write.", state=names.Code()),
        names.majority.run(engine, "Count."),
        names.mcts.run(engine, "Count.", budget=dd.Budget(nodes=20)),
        names.hitl.run(engine, "Plan."),
        names.solver.run(engine, "", state=game),
        names.tiny.run(engine, "Go.", budget=dd.Budget(nodes=10)),
        names.mixed.run(engine, "", state=game),
    ]
    for result in runs:
        with result:
            assert result.best.depth >= 1, result
    with pytest.raises(dd.CallbackError, match="grammar"):  # of that one it is three dots
        names.lats.run(engine, "Go.", state=names.Trip())


async def _rewards(texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]
