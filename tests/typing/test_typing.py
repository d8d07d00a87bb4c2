"""What users write type-checks strictly against the package, and what must not does not."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PREAMBLE = """\
import dendrite as dd
from tests.typing.programs import Game, Trip, judge, move, value, engine
"""
REFUSED = {
    "p: dd.Program[Game] = dd.compile(move, judge, strategy=dd.Beam(depth=3))": "Node[Trip]",
    "dd.compile(move, judge, strategy=dd.Beam(depth=3)).run(engine, state=Game((4,)))": '"Game"; expected "Never"',
    "dd.compile(move, judge, strategy=dd.Beam(depth=3)).run(engine, state=Trip())": '"Trip"; expected "Never"',
    "dd.compile(move, value, strategy=dd.Beam(depth=3)).run(engine, state=Trip())": '"Trip"; expected "Game"',
    "dd.compile(move, strategy=dd.Beam())": '"depth"',
    "dd.compile(3, strategy=dd.Beam(depth=3))": '"int"',
    "dd.prune(keep='3')": '"str"',
    "dd.Choice(['yes'], normalize='median')": "median",
    "@dd.score\ndef wrong(node: dd.Node[Game]) -> float: return float(node.state.right)": 'no attribute "right"',
    "@dd.score\ndef good(node: dd.Node) -> float: return 1.0\nn: int = good(engine)": '"Engine"; expected "Node[object]"',
}
ACCEPTED = {
    "an untyped scorer in a typed program": """
        p: dd.Program[Game] = dd.compile(move, value, strategy=dd.Beam(depth=3))
        left: tuple[int, ...] = p.run(engine, state=Game((4,))).best.state.left
        """,
    "typed events": """
        for event in dd.compile(move, value, strategy=dd.Beam(depth=3)).stream(engine, state=Game((4,))):
            if event.kind == "done" and event.result is not None:
                left: tuple[int, ...] = event.result.best.state.left
        """,
    "another strategy": """
        p: dd.Program[Game] = dd.compile(move, value, strategy=dd.Beam(depth=3)).replace(strategy=dd.BestOfN(3))
        """,
    "the stops of a result": """
        result = dd.compile(move, value, strategy=dd.Beam(depth=3)).run(engine, state=Game((4,)))
        done: bool = result.stopped in ("goal", "done", "budget", "cancelled")
        """,
}

Findings = dict[str, list[str]]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """What mypy, strict as the project has it, says of the programs and of each snippet; one run for all."""
    file = tmp_path_factory.mktemp("checked") / "snippets.py"
    cases = [*REFUSED, *ACCEPTED]
    bodies = [textwrap.dedent(ACCEPTED.get(case, case)).strip() for case in cases]
    text = PREAMBLE
    owner: dict[int, str] = {}
    for number, (case, body) in enumerate(zip(cases, bodies, strict=True)):
        text += f"def case_{number}() -> None:\n{textwrap.indent(body, '    ')}\n"
        owner |= dict.fromkeys(range(text.count("\n") - body.count("\n"), text.count("\n") + 1), case)
    file.write_text(text)
    programs = HERE / "programs.py"
    command = [sys.executable, "-m", "mypy", "--no-error-summary", str(programs), str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.stderr
    found: Findings = {case: [] for case in ["programs.py", *cases]}
    for line in done.stdout.splitlines():
        name, number_and_rest = Path(line.partition(":")[0]).name, line.partition(":")[2]
        if name == "snippets.py":
            found[owner[int(number_and_rest.partition(":")[0])]].append(line)
        elif name == "programs.py":
            found["programs.py"].append(line)
    return found


def test_the_programs_that_users_write_type_check(findings: Findings) -> None:
    """Every program of the agreed surface passes, strictly."""
    assert findings["programs.py"] == []


def test_the_programs_use_the_surface() -> None:
    """The programs really are there: each part of the surface is used by one of them."""
    tree = ast.parse((HERE / "programs.py").read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {"expand", "observe", "score", "prune", "compile", "ask", "start", "Choice", "Child", "Outcome"} <= used


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_goes_together_type_checks(findings: Findings, case: str) -> None:
    """States, events and results come out with the state's type."""
    assert findings[case] == []


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_not_type_check_does_not(findings: Findings, case: str) -> None:
    """Mixed states and wrong arguments are refused before anything runs."""
    assert any(REFUSED[case] in line for line in findings[case]), findings[case]
