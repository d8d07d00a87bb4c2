"""The ports of LangGraph's tutorials run, before and after, and differ in the lines that call the model alone."""

import difflib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dendrite.integrations.langchain import ChatDendrite
from dendrite.testing import scripted_engine

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def code(name: str) -> list[str]:
    lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
    return lines[lines.index("import time") :]


def script(text: str) -> list[str]:
    return ["7"] if "Rate this" in text else ["4 + 9 = 13", "6 * 4 = 24", "10 + 5 = 15"]


@pytest.mark.parametrize("port, num_lines", [("tot", 1), ("lats", 2)])
def test_a_port_differs_in_the_calls_alone(port: str, num_lines: int) -> None:
    """So little has to change."""
    changed = [line for line in difflib.ndiff(code(f"{port}_before"), code(f"{port}_after")) if line[0] in "+-"]
    assert len(changed) == 2 * num_lines


@pytest.mark.parametrize("name", ["tot_before", "tot_after"])
def test_tree_of_thoughts_keeps_the_best(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds of steps, those nearest to 24 first."""
    with scripted_engine(script) as engine:
        module = load(name, monkeypatch)
        graph = module.build(ChatDendrite(engine=engine, temperature=1.0))
        kept = graph.invoke({"numbers": "4 5 6 10"})["kept"]
        assert [steps.count("=") for steps in kept] == [3, 3, 3]
        assert kept == sorted(kept, key=module.distance)
        assert engine.stats().branches == 0


@pytest.mark.parametrize("name", ["lats_before", "lats_after"])
def test_tree_search_grades_all_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round adds graded answers, and the grades reach the root."""
    with scripted_engine(script) as engine:
        module = load(name, monkeypatch)
        root = module.build(ChatDendrite(engine=engine, temperature=1.0)).invoke({})["root"]
        assert root.visits == len(list(module.answers(root))) == 15
        assert root.value == 15 * 7
        assert engine.stats().branches == 0
