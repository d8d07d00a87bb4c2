"""The package's front door: what it exports, and that it opens at once."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dendrite

PACKAGE = Path(dendrite.__file__).parent
EXPORTS: list[str] = vars(dendrite)["__all__"]


def loaded_after(statement: str) -> set[str]:
    """The modules in a fresh interpreter after a statement."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(done.stdout.split())


def heavy(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} & {"torch", "pydantic", "transformers", "langgraph", "rich"}


def test_import_loads_nothing_heavy() -> None:
    """`import dendrite` loads neither torch nor pydantic, and of the package only what must precede torch."""
    modules = loaded_after("import dendrite")
    assert not heavy(modules)
    assert {name for name in modules if name.startswith("dendrite.")} == {"dendrite.engine", "dendrite.engine.openmp"}


def test_a_program_compiles_without_torch() -> None:
    """Decorating and compiling a program loads the DSL alone."""
    modules = loaded_after(
        "import dendrite as dd\n"
        "value = dd.score(lambda node: 1.0)\n"
        "dd.compile(dd.expand(cue='x'), value, strategy=dd.Beam(depth=2)).explain()"
    )
    assert not heavy(modules)
    assert "dendrite.dsl.search_loop" in modules


def test_node_for_tests_needs_no_torch() -> None:
    """A unit test of a decorated function stays light."""
    assert not heavy(loaded_after("from dendrite.testing import node\nnode('x')"))


def test_import_takes_under_100_ms() -> None:
    """The import itself, measured in this process with the package's own modules dropped, is far below its limit."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "dendrite"}
    try:
        seconds = []
        for _ in range(5):  # the others on a busy machine only ever make it longer
            for name in [name for name in sys.modules if name.partition(".")[0] == "dendrite"]:
                del sys.modules[name]
            start = time.perf_counter()
            __import__("dendrite")
            seconds.append(time.perf_counter() - start)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "dendrite"]:
            del sys.modules[name]
        sys.modules.update(kept)
    assert min(seconds) < 0.1


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_loads(name: str) -> None:
    """Each exported name leads to something, and stays the same object."""
    assert getattr(dendrite, name) is getattr(dendrite, name)


def test_editors_see_what_is_exported() -> None:
    """The stub that type checkers read names exactly the exports, from the modules that they are loaded from."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    seen = {
        alias.asname: statement.module
        for statement in stub.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == dendrite._ROOM_OF  # type: ignore[attr-defined]  # the stub leaves it out


def test_the_fixed_surface_is_exported() -> None:
    """Every name that users were promised is there."""
    promised = (
        "Engine Branch Generation Message Prompt Node Gen Child Outcome Reject Choice Mark expand observe score prune "
        "Strategy Beam DepthFirst BestFirst MCTS LATS SelfRefine BestOfN AdaptiveBranching Budget Event Result Search "
        "Program Part compile DendriteError ProgramError EngineError OutOfBlocks BranchError RequestError "
        "ConstraintError ModelError ContextOverflow SnapshotError CallbackError EngineClosed EngineDead"
    )
    assert set(promised.split()) <= set(EXPORTS)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A typing error is told as Python tells it, and `dir` lists what there is."""
    with pytest.raises(AttributeError, match="no attribute 'Egnine'"):
        _ = dendrite.Egnine  # type: ignore[attr-defined]  # on purpose
    assert set(EXPORTS) <= set(dir(dendrite))
