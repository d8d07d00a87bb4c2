"""Users' functions that fail: named with their line and node, or dropped; nothing of the search is left."""

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence

import pytest

import dendrite as dd
from dendrite.dsl.types import OnError
from dendrite.testing import Reply, scripted_engine

Part = Callable[[dd.Node], object] | Callable[[Sequence[dd.Node]], object] | dd.Mark


def script(text: str) -> Reply:
    return [" a\n", " b\n", " c\n"] if text.endswith("Step:") else {" yes": 0.75, " no": 0.25}


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    with scripted_engine(script) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats().blocks_used == 0


STEP = dd.expand(cue="\nStep:", width=6, stop="\n")


def compiled(*parts: Part, on_error: OnError = "raise") -> dd.Program:
    return dd.compile(*parts, strategy=dd.Beam(depth=2), on_error=on_error)


@dd.score
def good(node: dd.Node) -> float:
    return 1.0


@dd.score
def raises_on_b(node: dd.Node) -> float:
    if "b" in node.text:
        raise KeyError("b is unknown")
    return 1.0


@dd.score
async def nan_on_b(node: dd.Node) -> float:
    return math.nan if "b" in node.text else 1.0


@dd.score
def text_on_b(node: dd.Node) -> object:
    return "good" if "b" in node.text else 1.0


@dd.score
def nothing_on_b(node: dd.Node) -> object:
    return None if "b" in node.text else 1.0


@dd.observe
def observe_raises_on_b(node: dd.Node) -> object:
    return {" a": 1, " c": 2}[node.text]


BAD = [
    (raises_on_b, "raised KeyError: 'b is unknown'"),
    (nan_on_b, "returned NaN"),
    (text_on_b, "returned 'good', not a number or a Choice"),
    (nothing_on_b, "returned None, not a number or a Choice"),
    (observe_raises_on_b, "raised KeyError: ' b'"),
]


@pytest.mark.parametrize("part, complaint", BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_a_failing_function_is_named(engine: dd.Engine, part: Callable[..., object], complaint: str) -> None:
    """By its name, file and line, with the node's place and text, and the cause chained."""
    with pytest.raises(dd.CallbackError) as caught:
        compiled(STEP, part, good).run(engine, "Go.", seed=1)
    message = str(caught.value)
    assert complaint in message
    assert f"{part.__name__} ({__file__}:{part.__code__.co_firstlineno})" in message
    assert "node root/" in message
    assert "(' b')" in message
    assert 'on_error="drop"' in message
    assert isinstance(caught.value.__cause__, KeyError) == ("KeyError" in complaint)


@pytest.mark.parametrize("part, complaint", BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_nodes_that_a_function_fails_on_can_be_dropped(
    engine: dd.Engine, part: Callable[..., object], complaint: str
) -> None:
    """The others go on; the event says why."""
    events = list(compiled(STEP, part, good, on_error="drop").stream(engine, "Go.", seed=1))
    dropped = [event for event in events if event.kind == "dropped"]
    assert dropped
    assert all(complaint in event.detail and event.node.text == " b" for event in dropped)
    result = events[-1].result
    assert result is not None
    assert {node.status for node in result.tree if node.text == " b"} == {"dropped"}
    assert result.best.depth == 2
    assert "b" not in result.best.transcript
    result.close()


@dd.score
def too_few(nodes: Sequence[dd.Node]) -> list[float]:
    return [1.0]


@dd.score(batch=4)
async def raises_in_batches(nodes: Sequence[dd.Node]) -> list[float]:
    if len(nodes) < 4:
        raise ConnectionError("gone")
    return [1.0 for _ in nodes]


@dd.score
def one_number(nodes: Sequence[dd.Node]) -> object:
    return 3.0


@pytest.mark.parametrize(
    "part, complaint",
    [
        (too_few, "returned 1 scores for 6 nodes"),
        (raises_in_batches, "raised ConnectionError: gone, on nodes root/4, root/5"),
        (one_number, "returned 3.0, not one number a node"),
    ],
)
def test_a_failing_batch_is_named(engine: dd.Engine, part: Callable[..., object], complaint: str) -> None:
    """With the nodes of that batch."""
    with pytest.raises(dd.CallbackError, match=complaint):
        compiled(STEP, part).run(engine, "Go.")


def test_a_failing_batch_can_be_dropped(engine: dd.Engine) -> None:
    """Its nodes alone go."""
    with dd.compile(STEP, raises_in_batches, strategy=dd.Beam(depth=1), on_error="drop").run(engine, "Go.") as result:
        assert [node.status for node in list(result.tree)[1:]] == ["open"] * 4 + ["dropped"] * 2


@dd.expand(stop="\n")
def expand_raises_below(node: dd.Node) -> str:
    return ["\nStep:"][node.depth]


@dd.expand(stop="\n")
def expand_number(node: dd.Node) -> object:
    return 7 if node.depth else "\nStep:"


@pytest.mark.parametrize(
    "part, complaint",
    [
        (expand_raises_below, "raised IndexError: list index out of range, on node root/0"),
        (expand_number, "returned 7, not a cue, a Gen or a list of Children"),
    ],
)
def test_a_failing_expand_is_named_or_leaves_a_dead_end(
    engine: dd.Engine, part: Callable[..., object], complaint: str
) -> None:
    """In "drop", its node is not expanded but stays: it may still be the best."""
    with pytest.raises(dd.CallbackError, match=complaint):
        compiled(part, good).run(engine, "Go.")
    with compiled(part, good, on_error="drop").run(engine, "Go.") as result:
        assert result.best.name == "root/0"
        assert result.best.status == "open"


@pytest.mark.parametrize(
    "chosen, complaint",
    [
        (lambda nodes: 3, "returned 3, not a list of nodes it was given"),
        (lambda nodes: [nodes[0], nodes[0]], "returned a node twice"),
        (lambda nodes: nodes[0].path, "not a list of nodes it was given"),
        (lambda nodes: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_a_prune_function_chooses_among_its_nodes(
    engine: dd.Engine, chosen: Callable[..., object], complaint: str
) -> None:
    """Whatever else it returns is an error in every mode: there is no node to drop."""
    program = compiled(STEP, dd.prune(chosen), on_error="drop")
    with pytest.raises(dd.CallbackError, match=complaint):
        program.run(engine, "Go.")


def test_a_condition_that_fails_is_named(engine: dd.Engine) -> None:
    """`when=` is a function of the program like others."""

    def when(node: dd.Node) -> bool:
        raise ValueError("when?")

    with pytest.raises(dd.CallbackError, match=r"when .* raised ValueError: when\?, on node root"):
        compiled(dd.expand(cue="x", when=when), good).run(engine, "Go.")


def test_errors_of_the_package_pass_as_they_are(engine: dd.Engine) -> None:
    """A retry policy can tell them apart; a question that has no room is a node's own trouble, and dropped with it."""

    @dd.score
    async def overflow(node: dd.Node) -> float:
        await node.ask("x" * 20_000)
        return 1.0

    with pytest.raises(dd.ContextOverflow):
        compiled(STEP, overflow).run(engine, "Go.")
    with compiled(STEP, overflow, on_error="drop").run(engine, "Go.") as result:
        assert {row["status"] for row in result.tree.to_rows() if row["depth"]} == {"dropped"}


def test_reject_is_for_observe(engine: dd.Engine) -> None:
    """A score that raises it has failed."""

    @dd.score
    def rejecting(node: dd.Node) -> float:
        raise dd.Reject("no")

    with pytest.raises(dd.CallbackError, match="which only @observe may"):
        compiled(STEP, rejecting).run(engine, "Go.")


def test_async_functions_run_together_up_to_their_limit(engine: dd.Engine) -> None:
    """`concurrency` bounds the calls in flight; without it all run at once."""
    running = most = 0
    all_of_them = asyncio.Barrier(6)

    @dd.observe(concurrency=2)
    async def look(node: dd.Node) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        running -= 1

    @dd.score
    async def rate(node: dd.Node) -> float:
        await all_of_them.wait()
        return 1.0

    dd.compile(STEP, look, rate, strategy=dd.Beam(depth=1)).run(engine, "Go.").close()
    assert most == 2


def test_functions_run_on_the_callers_thread(engine: dd.Engine) -> None:
    """Never in one of their own, where they would slow the engine's steps."""
    import threading

    threads: set[int] = set()

    def note(node: dd.Node) -> None:
        threads.add(threading.get_ident())

    @dd.observe
    def look(node: dd.Node) -> None:
        note(node)

    @dd.score
    def rate(node: dd.Node) -> float:
        note(node)
        return 1.0

    compiled(STEP, look, rate).run(engine, "Go.").close()
    assert threads == {threading.get_ident()}


def test_numbers_of_other_libraries_are_numbers(engine: dd.Engine) -> None:
    """Arrays and tensors, as reward models return them."""
    import torch

    @dd.score
    def tensor(nodes: Sequence[dd.Node]) -> object:
        return torch.arange(len(nodes)) / 10

    with dd.compile(STEP, tensor, strategy=dd.Beam(depth=1)).run(engine, "Go.") as result:
        assert result.best.value == pytest.approx(0.5)
        assert type(result.best.value) is float
