"""The frame of the benchmarks: figures, turns, tables, and what the machine was doing."""

import io

from rich.console import Console

from dendrite.bench.figures import Figure, Result, figure
from dendrite.bench.machine import Machine, load_note, this_machine
from dendrite.bench.rounds import ratio_of, take_turns
from dendrite.bench.table import as_markdown, as_table

MACHINE = Machine("A Processor", 2, 2, {"python": "3.11", "torch": "2.13"})


def result_of(*figures: Figure) -> Result:
    return Result("tree", "a-model", MACHINE, figures, ("a note",), 12.0)


def test_figure_is_the_median_with_its_range() -> None:
    """One slow sample moves the range and not the figure."""
    found = figure("w", "e", "n", "ms", [2.0, 1.0, 90.0])
    assert (found.median, found.low, found.high, found.num_samples) == (2.0, 1.0, 90.0, 3)
    assert found.is_met is None


def test_goals_are_met_or_missed() -> None:
    """A goal is for the median, or for the ratio."""
    assert figure("w", "e", "n", "µs", [4.0], at_most=10).is_met is True
    assert figure("w", "e", "n", "µs", [11.0], at_most=10).is_met is False
    assert figure("w", "e", "n", "tokens/s", [1.0], ratio=2.5, ratio_at_least=2.0).is_met is True
    assert figure("w", "e", "n", "tokens/s", [1.0], ratio=1.9, ratio_at_least=2.0).is_met is False


def test_ratio_is_above_one_where_we_are_faster() -> None:
    """Rates and times are turned the same way round."""
    assert ratio_of([30.0], [10.0]) == 3.0
    assert ratio_of([10.0], [30.0], more_is_better=False) == 3.0


def test_rivals_take_turns() -> None:
    """A B, A B, A B: never all of one and then all of the other."""
    order: list[str] = []

    def run(name: str) -> dict[str, float]:
        order.append(name)
        return {"speed": float(len(order))}

    rivals = {"a": lambda: run("a"), "b": lambda: run("b")}
    samples = take_turns(rivals, num_rounds=3, patience=60, progress=lambda _: None, workload="w")
    assert order == ["a", "b"] * 3
    assert samples == {"a": {"speed": [1.0, 3.0, 5.0]}, "b": {"speed": [2.0, 4.0, 6.0]}}


def test_slow_rival_runs_once_at_least() -> None:
    """Whoever has used up the patience sits out the later rounds, but not the first."""
    rivals = {"slow": lambda: {"x": 1.0}, "other": lambda: {"x": 1.0}}
    samples = take_turns(rivals, num_rounds=3, patience=0, progress=lambda _: None, workload="w")
    assert samples == {"slow": {"x": [1.0]}, "other": {"x": [1.0]}}


def test_markdown_has_every_figure_and_the_machine() -> None:
    """The table for the documentation names goals, what became of them, the machine and the notes."""
    found = figure("32 × 64", "peer", "decode", "tokens/s", [70.0, 71.0, 74.0], ratio=2.6, ratio_at_least=2.5)
    lines = as_markdown(result_of(found)).splitlines()
    assert lines[2] == "| 32 × 64 | peer | decode | 71 | 70 to 74 | tokens/s | 2.60× | ratio ≥ 2.5 | met |"
    assert "A Processor, 2 cores, 2 threads; python 3.11, torch 2.13" in lines[4]
    assert lines[5] == "- a note"


def test_table_fits_the_terminal() -> None:
    """The same figures on a terminal."""
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(as_table(result_of(figure("w", "dendrite", "fork", "µs", [4.0, 4.2], at_most=10))))
    text = console.export_text()
    assert "dendrite bench tree · a-model" in text
    assert "≤ 10 µs" in text
    assert "met" in text


def test_json_holds_plain_values() -> None:
    """Everything a program wants to read is there under its name."""
    found = result_of(figure("w", "dendrite", "fork", "µs", [4.0])).to_json()
    assert found["machine"] == {
        "processor": "A Processor",
        "num_cores": 2,
        "num_threads": 2,
        "versions": {"python": "3.11", "torch": "2.13"},
        "gpu": "",
    }


def test_busy_machine_is_noted() -> None:
    """A quiet machine needs no note, a busy one gets one, and so does one that cannot tell."""
    assert load_note([0.02, 0.1]) == []
    assert "80%" in load_note([0.02, 0.8])[0]
    assert "not known" in load_note([None])[0]


def test_this_machine_names_itself() -> None:
    """Processor, cores, threads and versions are found."""
    machine = this_machine()
    assert machine.processor
    assert machine.num_cores >= 1
    assert set(machine.versions) == {"python", "torch", "transformers"}
