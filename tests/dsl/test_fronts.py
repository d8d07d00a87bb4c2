"""The ways to run a program: one search, waited for differently; none leaves anything behind."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import dendrite as dd
from dendrite.testing import Reply, scripted_engine

ROOT = Path(dd.__file__).parent.parent


def script(text: str) -> Reply:
    return [" a\n", " b\n", " c\n"] if text.endswith("Step:") else {" yes": 0.75, " no": 0.25}


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    with scripted_engine(script) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats().blocks_used == 0


@dd.score
def letters(node: dd.Node) -> float:
    return node.transcript.count("a") - node.transcript.count("c")


STEP = dd.expand(cue="\nStep:", width=3, stop="\n")
PROGRAM = dd.compile(STEP, letters, dd.prune(keep=2), strategy=dd.Beam(depth=3))


def tree_of(result: dd.Result) -> str:
    with result:
        return result.tree.to_json()


def test_all_fronts_give_the_same_search(engine: dd.Engine) -> None:
    """Run, arun, stream, astream, start and map differ in how they wait, and in nothing else."""

    async def streamed() -> str:
        events = [event async for event in PROGRAM.astream(engine, "Go.", seed=5)]
        assert events[-1].result is not None
        return tree_of(events[-1].result)

    last = list(PROGRAM.stream(engine, "Go.", seed=5))[-1]
    assert last.result is not None
    with PROGRAM.start(engine, "Go.", seed=5) as search:
        started = tree_of(search.result())
    trees = [
        tree_of(PROGRAM.run(engine, "Go.", seed=5)),
        tree_of(asyncio.run(PROGRAM.arun(engine, "Go.", seed=5))),
        tree_of(last.result),
        asyncio.run(streamed()),
        started,
        *map(tree_of, PROGRAM.map(engine, [("Go.", None)] * 3, concurrency=2, seed=5)),
    ]
    assert set(trees) == {trees[0]}


async def test_run_works_inside_a_running_event_loop(engine: dd.Engine) -> None:
    """As in a notebook: the search has a thread of its own, and other sync fronts too."""
    tree = tree_of(PROGRAM.run(engine, "Go.", seed=5))
    assert tree == tree_of(await PROGRAM.arun(engine, "Go.", seed=5))
    last = list(PROGRAM.stream(engine, "Go.", seed=5))[-1]
    assert last.result is not None
    assert tree == tree_of(last.result)


def test_run_works_in_a_plain_thread(engine: dd.Engine) -> None:
    """One without an event loop."""
    trees: list[str] = []
    thread = threading.Thread(target=lambda: trees.append(tree_of(PROGRAM.run(engine, "Go.", seed=5))))
    thread.start()
    thread.join()
    assert trees == [tree_of(PROGRAM.run(engine, "Go.", seed=5))]


async def test_async_functions_run_on_the_callers_loop(engine: dd.Engine) -> None:
    """So they can use the connections that live there."""
    loops: set[asyncio.AbstractEventLoop] = set()

    @dd.score
    async def rate(node: dd.Node) -> float:
        loops.add(asyncio.get_running_loop())
        return 1.0

    (await dd.compile(STEP, rate, strategy=dd.Beam(depth=1)).arun(engine, "Go.")).close()
    assert loops == {asyncio.get_running_loop()}


def test_events_come_in_their_order(engine: dd.Engine) -> None:
    """Of a round: made, scored, the frontier, the choice, the pruned; `done` with the result at the end."""
    events = list(PROGRAM.stream(engine, "Go.", seed=5))
    kinds = [event.kind for event in events]
    assert kinds[0] == "opened"
    assert kinds[1:5] == ["proposed", "forked", "forked", "forked"]
    assert sorted(kinds[5:11]) == ["expanded"] * 3 + ["scored"] * 3
    assert kinds[11:17] == ["told", "frontier", "round", "told", "proposed", "proposed"] or kinds[11:16] == [
        "told",
        "frontier",
        "round",
        "told",
        "pruned",
    ]
    assert kinds[-1] == "done"
    assert kinds.count("done") == 1
    frontier = events[kinds.index("frontier")]
    assert [node.value for node in frontier.nodes] == sorted((n.value or 0 for n in frontier.nodes), reverse=True)
    result = events[-1].result
    assert result is not None
    assert events[-1].node == result.best
    result.close()


def test_leaving_a_stream_early_prunes(engine: dd.Engine) -> None:
    """Closing the iterator ends the search."""
    stream = PROGRAM.stream(engine, "Go.")
    for event in stream:
        if event.kind == "scored":
            break
    assert engine.stats().branches > 0
    stream.close()
    assert engine.stats().branches == 0


async def test_leaving_an_astream_early_prunes(engine: dd.Engine) -> None:
    """The same for asyncio, with `aclosing`."""
    async with contextlib.aclosing(PROGRAM.astream(engine, "Go.")) as stream:
        async for event in stream:
            if event.kind == "scored":
                break
        assert engine.stats().branches > 0
    assert engine.stats().branches == 0


async def test_a_cancelled_task_prunes_all_it_made(engine: dd.Engine) -> None:
    """Wherever it was: here, in a user's function, with a side question open."""
    reached = asyncio.Event()

    @dd.score
    async def stuck(node: dd.Node) -> float:
        await node.ask("Well?")
        reached.set()
        await asyncio.sleep(3600)
        return 1.0

    task = asyncio.create_task(dd.compile(STEP, stuck, strategy=dd.Beam(depth=1)).arun(engine, "Go."))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.stats().branches == 0


async def test_many_searches_at_once(engine: dd.Engine) -> None:
    """They share the engine's batches and know nothing of each other."""
    alone = [tree_of(await PROGRAM.arun(engine, f"Go {n}.", seed=n)) for n in range(8)]
    results = await asyncio.gather(*(PROGRAM.arun(engine, f"Go {n}.", seed=n) for n in range(8)))
    assert [tree_of(result) for result in results] == alone


def test_map_keeps_the_order_of_its_inputs(engine: dd.Engine) -> None:
    """And the states that came with them."""
    inputs = [(f"Go {n}.", n) for n in range(5)]
    results = dd.compile(STEP, letters, strategy=dd.Beam(depth=1)).map(engine, inputs, concurrency=2)
    assert [result.best.state for result in results] == list(range(5))
    assert [result.best.transcript[:5] for result in results] == [prompt for prompt, _ in inputs]
    for result in results:
        result.close()


def test_a_failing_input_ends_a_map_with_nothing_left(engine: dd.Engine) -> None:
    """Results that were there already are closed."""

    @dd.score
    def picky(node: dd.Node) -> float:
        return 1.0 / (3 - int(str(node.state)))

    with pytest.raises(dd.CallbackError, match="ZeroDivisionError"):
        dd.compile(STEP, picky, strategy=dd.Beam(depth=1)).map(engine, [("Go.", n) for n in range(5)], concurrency=1)
    assert engine.stats().branches == 0


def test_choosing_by_hand(engine: dd.Engine) -> None:
    """The kept nodes are the frontier of the next round, whatever their values."""
    with PROGRAM.start(engine, "Go.") as search:
        names = []
        for frontier in search:
            assert [node.value for node in frontier] == sorted((n.value or 0 for n in frontier), reverse=True)
            search.keep([frontier[-1]])
            names.append(frontier[-1].name)
        result = search.result()
        assert [node.name for node in result.best.path[1:]] == names
        assert len(result.leaves) == 1
        result.close()


def test_keeping_what_is_not_there_is_refused(engine: dd.Engine) -> None:
    """A foreign node, a node twice, or at the wrong time: nothing is changed."""
    with PROGRAM.start(engine, "Go.", seed=5) as search:
        with pytest.raises(dd.ProgramError, match="inside the for loop"):
            search.keep([])
        for frontier in search:
            with pytest.raises(dd.ProgramError, match="nodes of this frontier"):
                search.keep(frontier[0].path)
            with pytest.raises(dd.ProgramError, match="nodes of this frontier"):
                search.keep([frontier[0], frontier[0]])
        with pytest.raises(dd.ProgramError, match="inside the for loop"):
            search.keep(search.result().leaves)
        assert tree_of(search.result()) == tree_of(PROGRAM.run(engine, "Go.", seed=5))


def test_a_search_by_hand_can_be_left_cancelled_or_closed(engine: dd.Engine) -> None:
    """Cancelling gives what there is; closing gives everything back."""
    with PROGRAM.start(engine, "Go.") as search:
        for _ in search:
            search.cancel()
        with search.result() as result:
            assert result.stopped == "cancelled"
            assert result.best.depth == 1
    with PROGRAM.start(engine, "Go.") as search:
        next(iter(search))
        assert engine.stats().branches > 0
    assert engine.stats().branches == 0
    with pytest.raises(dd.ProgramError, match="closed before it ended"):
        search.result()


def test_an_async_person_chooses(engine: dd.Engine) -> None:
    """A `@prune` function may wait for anything."""
    answers: asyncio.Queue[int] = asyncio.Queue()

    @dd.prune
    async def human(nodes: Sequence[dd.Node]) -> Sequence[dd.Node]:
        return [nodes[await answers.get()]]

    async def main() -> list[str]:
        task = asyncio.create_task(dd.compile(STEP, human, strategy=dd.Beam(depth=2)).arun(engine, "Go."))
        for number in (2, 1):
            await answers.put(number)
        with await task as result:
            return [node.name for node in result.best.path]

    assert asyncio.run(main()) == ["root", "root/2", "root/2/1"]


CTRL_C = """
import asyncio, os, signal
import dendrite as dd
from dendrite.testing import scripted_engine

times = 0

@dd.score
async def rate(node):
    global times
    if node.depth == 2:
        if times:
            times -= 1
            os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(3600)
    return 1.0

program = dd.compile(dd.expand(cue=" Step:", width=2, max_tokens=3), rate, strategy=dd.Beam(depth=3))
with scripted_engine(lambda text: "abc") as engine:
    fronts = [program.run, lambda *on: list(program.stream(*on)), lambda *on: program.start(*on).result(), program.run]
    for front, times in zip(fronts, (1, 1, 1, 2)):
        try:
            front(engine, "Go.")
        except KeyboardInterrupt:
            engine.check_integrity()
            print("interrupted,", engine.stats().branches, "branches,", engine.stats().blocks_used, "blocks")
"""


@pytest.mark.skipif(os.name == "nt", reason="there are no signals to send")
def test_ctrl_c_prunes_and_is_raised() -> None:
    """In the middle of a search, by any synchronous front; an impatient second Ctrl-C as well."""
    done = subprocess.run([sys.executable, "-c", CTRL_C], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["interrupted, 0 branches, 0 blocks"] * 4, done.stderr
