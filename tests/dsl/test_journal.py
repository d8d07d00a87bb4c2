"""Searches that were ended, by a kill or by hand, and gone on from: the result is that of an unbroken one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import dendrite as dd
from dendrite.dsl.seals import sealed, unsealed
from dendrite.testing import Reply, scripted_engine

ROOT = Path(dd.__file__).parent.parent


@dataclass(frozen=True)
class Sum:
    total: int = 0
    steps: tuple[int, ...] = ()


def script(text: str) -> Reply:
    if text.endswith("Step:"):
        return [" 1\n", " 5\n", " 9\n"]
    return "too much" if text.endswith("wrong?") else {" yes": 0.75, " no": 0.25}


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    with scripted_engine(script) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats().blocks_used == 0


@dd.expand(width=3, stop="\n")
def step(node: dd.Node[Sum]) -> str:
    return "".join(f"\n[{lesson}]" for lesson in node.reflections) + "\nStep:"


@dd.observe
def add(node: dd.Node[Sum]) -> dd.Outcome[Sum]:
    digit = int(node.text)
    state = Sum(node.state.total + digit, (*node.state.steps, digit))
    if digit == 1 and node.state.total == 9:
        raise dd.Reject("dull")
    return dd.Outcome(state, append=" (seen)", terminal=state.total > 30)


@dd.score
def closeness(node: dd.Node[Sum]) -> float:
    return -abs(29.5 - node.state.total)


@dd.score
def sure(node: dd.Node[Sum]) -> dd.Choice:
    return dd.Choice(["yes", "no"], "\nSure?")


STRATEGIES: list[dd.Strategy] = [
    dd.Beam(depth=4),
    dd.DepthFirst(depth=3),
    dd.MCTS(12, parallel=3),
    dd.MCTS(8, rule="puct", rollout=2),
    dd.LATS(12, reflect="\nWhat is wrong?", parallel=2),
    dd.BestOfN(5, vote=lambda node: node.text, depth=2),
    dd.SelfRefine(3, critique="\nWhat is wrong?"),
    dd.AdaptiveBranching(15, parallel=2),
]


def program(strategy: dd.Strategy) -> dd.Program[Sum]:
    return dd.compile(
        step, add, closeness, sure, dd.prune(keep=3), strategy=strategy, merge=lambda node: node.state.steps
    )


def tree_of(result: dd.Result[Sum]) -> str:
    with result:
        assert result.best.branch.text.endswith(result.best.transcript.removeprefix("Go."))
        return result.tree.to_json()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_search_goes_on_from_any_line_of_its_journal(
    engine: dd.Engine, tmp_path: Path, strategy: dd.Strategy
) -> None:
    """Cut anywhere, in the middle of a line too, it comes to the tree it would have come to."""
    whole = tmp_path / "whole.jsonl"
    wanted = tree_of(program(strategy).run(engine, "Go.", state=Sum(), seed=7, journal=whole))
    assert wanted == tree_of(program(strategy).run(engine, "Go.", state=Sum(), seed=7)), "a journal changes nothing"
    lines = whole.read_bytes().splitlines(keepends=True)
    for cut in sorted({1, 2, len(lines) // 2, len(lines) - 1, len(lines)}):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(b"".join(lines[:cut]) + b'{"told": {"ki')
        assert tree_of(program(strategy).resume(path, engine)) == wanted
        assert b'{"told": {"ki{' not in path.read_bytes()
        assert tree_of(program(strategy).resume(path, engine)) == wanted, "a journal that was gone on from is whole"


KILLED = """
import os, signal, sys
import dendrite as dd
from dendrite.testing import scripted_engine

@dd.expand(width=3, stop="\\n")
def step(node: dd.Node[int]) -> str:
    return "\\nStep:"

@dd.observe
def add(node: dd.Node[int]) -> int:
    return node.state + int(node.text)

@dd.score
def closeness(node: dd.Node[int]) -> float:
    if node.depth == 3 and "kill" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    return -abs(20 - node.state)

program = dd.compile(step, add, closeness, strategy=dd.MCTS(20, parallel=4))
with scripted_engine(lambda text: [" 1\\n", " 5\\n", " 9\\n"]) as engine:
    if "resume" in sys.argv:
        result = program.resume(sys.argv[1], engine)
    else:
        result = program.run(engine, "Go.", state=0, journal=sys.argv[1], seed=3)
    print(result.tree.to_json())
    result.close()
    assert engine.stats().blocks_used == 0
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL to send")
def test_a_search_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """SIGKILL half-way, in another process; a third one goes on and ends with the same tree."""
    file = tmp_path / "search.py"
    file.write_text(KILLED)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(file), *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )

    unbroken = run(str(tmp_path / "unbroken.jsonl"))
    assert unbroken.returncode == 0, unbroken.stderr
    path = tmp_path / "killed.jsonl"
    assert run(str(path), "kill").returncode == -signal.SIGKILL
    num_told = path.read_text().count('{"told"')
    assert 0 < num_told < 20
    resumed = run(str(path), "resume")
    assert resumed.stdout == unbroken.stdout, resumed.stderr


def test_a_budget_goes_on_too(engine: dd.Engine, tmp_path: Path) -> None:
    """What was spent stays spent; a larger one lets the search go on to its end."""
    beam = program(dd.Beam(depth=4))
    path = tmp_path / "run.jsonl"
    with beam.run(engine, "Go.", state=Sum(), seed=7, budget=dd.Budget(nodes=7), journal=path) as result:
        assert result.stopped == "budget"
    with beam.resume(path, engine) as result:
        assert result.stopped == "budget"
        assert result.usage.nodes == 7
    with beam.resume(path, engine, budget=dd.Budget(nodes=1000)) as result:
        assert result.stopped == "done"
        assert result.best.depth == 4


def test_a_search_by_hand_is_saved_and_gone_on_from(engine: dd.Engine, tmp_path: Path) -> None:
    """What a person chose stays chosen."""
    beam = program(dd.Beam(depth=3))
    path = tmp_path / "search.jsonl"
    with beam.start(engine, "Go.", state=Sum(), seed=7) as search:
        for number, frontier in enumerate(search):
            if number == 1:
                search.save(path)
                break
            search.keep([frontier[-1]])
            name = frontier[-1].name
        with pytest.raises(dd.ProgramError, match="exists"):
            search.save(path)
    with beam.resume(path, engine) as result:
        assert result.best.path[1].name == name
        assert result.best.depth == 3


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock, so nobody is refused there")
def test_a_journal_has_one_writer(engine: dd.Engine, tmp_path: Path) -> None:
    """While a search writes to it, nobody goes on from it or begins it anew, and nothing of it is lost."""
    path, strategy = tmp_path / "search.jsonl", dd.MCTS(8)
    wanted = tree_of(program(strategy).run(engine, "Go.", state=Sum(), seed=7, journal=path))
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    with program(strategy).reopen(path, engine):
        written = path.read_bytes() + b'{"told'  # as it is while a line is being written
        path.write_bytes(written)
        with pytest.raises(dd.SnapshotError, match="in use"):
            program(strategy).resume(path, engine)
        with pytest.raises(dd.ProgramError, match="exists"):
            program(strategy).run(engine, "Go.", state=Sum(), journal=path)
        assert path.read_bytes() == written
    with pytest.raises(dd.SnapshotError, match="program"):
        dd.compile(step, add, closeness, strategy=strategy).resume(path, engine)
    assert tree_of(program(strategy).resume(path, engine)) == wanted, "who was refused holds no lock"


def test_a_journal_is_not_written_over(engine: dd.Engine, tmp_path: Path) -> None:
    """The message says what to do; nothing is changed."""
    path = tmp_path / "run.jsonl"
    path.write_text("something")
    with pytest.raises(dd.ProgramError, match=r"program\.resume"):
        program(dd.Beam(depth=1)).run(engine, "Go.", state=Sum(), journal=path)
    assert path.read_text() == "something"


@pytest.mark.parametrize("place", [".", "missing/run.jsonl"])
def test_a_journal_that_cannot_be_written_is_refused(engine: dd.Engine, tmp_path: Path, place: str) -> None:
    """A folder, or a file in one that is not there; nothing is run."""
    with pytest.raises(dd.ProgramError, match="cannot be written"):
        program(dd.Beam(depth=1)).run(engine, "Go.", state=Sum(), journal=tmp_path / place)
    search = program(dd.Beam(depth=1)).start(engine, "Go.", state=Sum())
    with search, pytest.raises(dd.ProgramError, match="cannot be written"):
        search.save(tmp_path / place)


@dd.score
def other(node: dd.Node[Sum]) -> float:
    return 0.0


@dataclass(frozen=True)
class Renamed:
    sum: int = 0


def edited(header: dict[str, object]) -> None:
    header["model"] = "another-model"


def other_fields(header: dict[str, object]) -> None:
    header["state"] = {"name": "Sum", "digest": "0"}


def other_version(header: dict[str, object]) -> None:
    header["journal"] = 99


def resealed(lines: list[dict[str, object]]) -> bytes:
    seal, written = "", b""
    for line in lines:
        line.pop("seal")
        one, seal = sealed(line, seal)
        written += one
    return written


@pytest.mark.parametrize(
    "resumed, edit, complaint",
    [
        (dd.compile(step, add, closeness, strategy=dd.Beam(depth=3)), None, "strategy Beam.depth=2.*not Beam.depth=3"),
        (dd.compile(step, add, other, strategy=dd.Beam(depth=2)), None, "another program: closeness, other changed"),
        (dd.compile(step, add, closeness, strategy=dd.Beam(depth=2)), edited, "another-model, not scripted"),
        (dd.compile(step, add, closeness, strategy=dd.Beam(depth=2)), other_fields, "states of Sum, whose fields"),
        (dd.compile(step, add, closeness, strategy=dd.Beam(depth=2)), other_version, "version 99"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    engine: dd.Engine,
    tmp_path: Path,
    resumed: dd.Program[Sum],
    edit: Callable[[dict[str, object]], None] | None,
    complaint: str,
) -> None:
    """Another strategy, function, model, state or version; the journal stays as it is."""
    path = tmp_path / "run.jsonl"
    dd.compile(step, add, closeness, strategy=dd.Beam(depth=2)).run(engine, "Go.", state=Sum(), journal=path).close()
    if edit is not None:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        edit(lines[0])
        path.write_bytes(resealed(lines))
    before = path.read_bytes()
    with pytest.raises(dd.SnapshotError, match=complaint):
        resumed.resume(path, engine)
    assert path.read_bytes() == before


def test_another_branch_is_refused(engine: dd.Engine, tmp_path: Path) -> None:
    """A search on a branch goes on from a branch that says the same."""
    beam = program(dd.Beam(depth=2))
    path = tmp_path / "run.jsonl"
    with engine.root("A text.") as branch, engine.root("Another.") as another, engine.root("A text.") as same:
        wanted = beam.run(branch, " Go.", state=Sum(), journal=path)
        for wrong in (another, engine):
            with pytest.raises(dd.SnapshotError, match="was started on a branch"):
                beam.resume(path, wrong)
        with wanted, beam.resume(path, same) as result:
            assert result.tree.to_json() == wanted.tree.to_json()


def test_an_altered_journal_is_refused(engine: dd.Engine, tmp_path: Path) -> None:
    """A changed bit, a line less and two lines swapped, wherever: it is never gone on from to another result."""
    beam = program(dd.Beam(depth=2))
    path = tmp_path / "run.jsonl"
    wanted = tree_of(beam.run(engine, "Go.", state=Sum(), seed=7, journal=path))
    lines = path.read_bytes().splitlines(keepends=True)
    altered = [b"".join([*lines[:at], *lines[at + 1 :]]) for at in range(1, len(lines) - 1)]
    altered += [b"".join([*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]]) for at in range(1, len(lines) - 1)]
    whole = b"".join(lines)
    altered += [
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(lines[0]), len(whole) - 1, 31)
    ]
    for content in altered:
        path.write_bytes(content)
        with pytest.raises(dd.SnapshotError, match=r"line \d+ of .*run.jsonl is not what was written"):
            beam.resume(path, engine)
        assert path.read_bytes() == content
    path.write_bytes(whole)
    assert tree_of(beam.resume(path, engine)) == wanted


def test_a_line_may_hold_half_a_character() -> None:
    """A tool's broken output may end up in one; it is written and read as it is."""
    written, seal = sealed({"text": "a\udc80 \u2028 é"}, "before")
    assert unsealed(written, "before") == ({"text": "a\udc80 \u2028 é"}, seal)
    with pytest.raises(ValueError, match="does not fit its seal"):
        unsealed(written, "another")


@pytest.mark.parametrize("content", [None, b"", b"no json\n", b'{"a": 1}\n', b"[1]\n"])
def test_what_is_no_journal_is_refused(engine: dd.Engine, tmp_path: Path, content: bytes | None) -> None:
    """With what it should be."""
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(dd.SnapshotError, match="cannot be read" if content is None else "no journal"):
        program(dd.Beam(depth=1)).resume(path, engine)


def test_states_that_do_not_survive_are_refused(engine: dd.Engine, tmp_path: Path) -> None:
    """Before the search starts, or when the first such state comes up; nothing is left."""

    @dd.observe
    def count(node: dd.Node) -> object:
        return (1, 2)

    untyped = dd.compile(dd.expand(cue="\nStep:", stop="\n"), count, strategy=dd.Beam(depth=2))
    with pytest.raises(dd.ProgramError, match=r"\(1, 2\) does not survive .* annotate the functions' nodes"):
        untyped.run(engine, "Go.", journal=tmp_path / "run.jsonl")
    with pytest.raises(dd.ProgramError, match="does not survive"):
        untyped.run(engine, "Go.", state=object(), journal=tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()
