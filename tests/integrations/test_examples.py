"""The ports of LangGraph's tutorials run, before and after, and differ in the lines that call the model alone."""

import difflib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from dendrite.integrations.langchain import ChatDendrite
from dendrite.integrations.langgraph import TimeTravelSaver
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
    return lines[lines.index("from typing import Any, TypedDict") if "lats" in name else lines.index("import re") :]


def script(text: str) -> list[str]:
    return ["7"] if "Rate this" in text else ["4 + 9 = 13", "6 * 4 = 24", "10 + 5 = 15"]


@pytest.mark.parametrize(
    "name", ["tot_before", "tot_after", "lats_before", "lats_after", "measure_ports", "measure_time_travel"]
)
def test_ports_are_short(name: str) -> None:
    """Each is one file of less than 80 lines."""
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80


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


def test_the_ports_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides in turn on one engine; each side of a port samples as many tokens."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = load("measure_ports", monkeypatch)
    with scripted_engine(script) as engine:
        for port in module.PORTS:
            sides = module.compare(engine, port, 1)
            module.show(port, sides)
            assert {run.num_sampled for runs in sides.values() for run in runs} == {sides["after"][0].num_sampled}
    said = capsys.readouterr().out
    assert "| tot, before |" in said
    assert "lats: " in said


def test_time_travel_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that holds K/V computes the new token alone, one that holds tokens computes all of them."""
    module = load("measure_time_travel", monkeypatch)
    with scripted_engine(script) as engine:
        held = module.replays(engine, TimeTravelSaver(InMemorySaver(), engine), 2, num_tokens=300)
        assert all(run.num_computed <= 2 for run in held)
        lost = module.replays(engine, TimeTravelSaver(InMemorySaver()), 2, num_tokens=300)
        assert [run.num_computed > 280 for run in lost] == [True, True], lost
