"""The programs of the agreed surface (tests/typing/programs.py) run as they are written: on a script, and on the model.

What is put in place of the file's own words: its three dots by a grammar; around the model, budgets, because the file
sets none; and the engine stays open after the file's first `with`, since most programs stand below it.
"""

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
ACTS = 'start: ("search " | "finish ") /[a-z]{1,8}/'
IN_PLACE = {'"..."': repr(ACTS)}
BUDGETS = {
    '"Use 4 9 10 13 to make 24.")': '"Use 4 9 10 13 to make 24.", budget=dd.Budget(nodes=5))',
    '"Plan a trip."}])': '"Plan a trip."}], budget=dd.Budget(tokens=16))',
    'start(engine, "Plan:")': 'start(engine, "Plan:", budget=dd.Budget(nodes=5))',
    "max_tokens=64": "max_tokens=8",
    "max_tokens=100": "max_tokens=12",
}
"""Call -> the same with a budget."""


def script(text: str) -> Reply:
    if text.endswith("Step:"):
        return [" 1 + 2 = 3\n", " 4 * 6 = 24\n"]
    if text.endswith("Act:"):
        return ["search a", "finish b"]
    return {"yes": 0.5, " yes": 0.2, " sure": 0.2, "no": 0.1}


def rewritten(text: str, changes: dict[str, str]) -> str:
    """The file with the changes, each of which has its place in it."""
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def executed(engine: dd.Engine, text: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file from its first line to its last on an engine; a person always says 1."""
    monkeypatch.setattr(dd.Engine, "load", classmethod(lambda cls, name: contextlib.nullcontext(engine)))
    monkeypatch.setattr("builtins.input", lambda: "1")
    module = ModuleType("surface_programs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(text, str(SOURCE), "exec"), vars(module))  # noqa: S102 - our own file
    return module


@pytest.fixture(params=["scripted", "real"])
def engine(request: pytest.FixtureRequest, real_model_folder: Path) -> Iterator[dd.Engine]:
    script_or_model: contextlib.AbstractContextManager[dd.Engine] = (
        scripted_engine(script) if request.param == "scripted" else dd.Engine.load(str(real_model_folder), seed=1)
    )
    with script_or_model as engine:
        yield engine
        engine.check_integrity()


def test_every_program_runs(engine: dd.Engine, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Those that the file only compiles are run too; its empty functions are given something to say."""
    is_real = request.node.callspec.params["engine"] == "real"
    text = rewritten(SOURCE.read_text(), IN_PLACE | BUDGETS if is_real else IN_PLACE)
    names: Any = executed(engine, text, monkeypatch)
    names.prm = _rewards
    names.legal = lambda game: ["1 + 3", "2 + 2"] if len(game.left) > 1 else []
    names.play = lambda game, move: names.Game(game.left[1:])
    game = names.Game((4, 9, 10))
    few, short = dd.Budget(nodes=5), dd.Budget(tokens=16)
    runs = {
        "dfs": names.dfs.run(engine, "", state=game),
        "lats": names.lats.run(engine, "Where is it warm?", state=names.Trip(), budget=dd.Budget(nodes=4, tokens=48)),
        "refine": names.refine.run(engine, "Write.", state=names.Code(), budget=short),
        "majority": names.majority.run(engine, "Count."),
        "mcts": names.mcts.run(engine, "Count.", budget=few),
        "hitl": names.hitl.run(engine, "Plan.", budget=few),
        "solver": names.solver.run(engine, "", state=game),
        "tiny": names.tiny.run(engine, "Go.", budget=short),
        "mixed": names.mixed.run(engine, "", state=game),
    }
    for name, result in runs.items():
        with result:
            assert result.best.depth >= 1, name
            texts = [node.text for node in list(result.tree)[1:] if node.status != "dropped"]
            if name in ("dfs", "solver", "mixed"):
                assert set(texts) <= {"1 + 3", "2 + 2"}, name
            if name == "lats":
                assert all(said.startswith(("search ", "finish ")) for said in texts if " " in said)
    names.search.result().close()
    for branch in (names.a, names.b, names.root):
        branch.prune()


async def _rewards(texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]
