"""Every allocation and every call of the runner fails in turn: nothing leaks, and the next call works."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from dendrite.engine.batch import Batch, Plan
from dendrite.engine.blocks import BlockPool
from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine
from dendrite.engine.errors import StepFailed
from dendrite.engine.ids import BlockId
from dendrite.engine.step import Step
from dendrite.testing import scripted_engine
from dendrite.testing.runner import ScriptedMover, ScriptedRunner
from tests.engine.test_pressure import reply


class Fault:
    """Counts calls, and raises in the one it is set to."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.at = -1
        self.error: Exception = RuntimeError("injected")

    def wrap(self, patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        sound: Callable[..., object] = getattr(owner, name)

        def unsound(*args: object, **options: object) -> object:
            self.num_calls += 1
            if self.num_calls - 1 == self.at:
                raise self.error
            return sound(*args, **options)

        patch.setattr(owner, name, unsound)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only what nobody refers to is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def work(engine: Engine) -> list[str]:
    """Forks, a call, a score and a second level in a pool that is too small, so that K/V is moved out and in."""
    root = engine.root("all of it hangs on this:", seed=2)
    kids = root.fork(4)
    engine.generate(kids, max_tokens=7, temperature=1.0)
    scores = [kid.score([" good", " rather bad"])[0] for kid in kids]
    late = [kid.fork(1, at=kid.num_tokens - 2)[0].append(" then") for kid in kids]
    outs = engine.generate(late, max_tokens=5, temperature=1.0)
    return [*(kid.text for kid in kids), *(out.text for out in outs), *(f"{score:.3f}" for score in scores)]


def engine_under_pressure(name: str) -> Engine:
    """Files come into play where there is no memory beside the pool."""
    return scripted_engine(reply, num_blocks=18, swap_memory=0 if name in ("write", "read") else 300, swap_disk=4000)


PLACES = [
    (ScriptedRunner, "run"),
    (ScriptedRunner, "logits"),
    (BlockPool, "allocate"),
    (ScriptedMover, "save"),
    (ScriptedMover, "load"),
    (ScriptedMover, "write"),
    (ScriptedMover, "read"),
    (ScriptedMover, "copy_blocks"),
]


@pytest.mark.parametrize("owner, name", PLACES, ids=lambda part: getattr(part, "__name__", part))
def test_a_fault_anywhere_leaks_nothing(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that meets it fails with `StepFailed`, or does not notice; the work done again gives what it should."""
    with engine_under_pressure(name) as engine:
        wanted = work(engine)
    fault = Fault()
    fault.wrap(monkeypatch, owner, name)
    with engine_under_pressure(name) as engine:
        work(engine)
    num_calls, failures = fault.num_calls, 0
    assert num_calls > 0
    for at in range(num_calls):
        with engine_under_pressure(name) as engine:
            fault.num_calls, fault.at = 0, at
            try:
                assert work(engine) == wanted
            except StepFailed:
                failures += 1
            fault.at, fault.error = -1, RuntimeError("injected")  # the old one's traceback names frames with branches
            engine.check_integrity()
            assert work(engine) == wanted
            engine.check_integrity()
            stats = engine.stats()
            assert (stats.branches, stats.blocks_used, stats.swap_memory_used, stats.swap_disk_used) == (0, 0, 0, 0)
    assert failures > 0 or owner is ScriptedMover


async def fail(root: Branch, front: str) -> None:
    branch = root.fork()
    with suppress(StepFailed):
        match front:
            case "generate":
                branch.generate(max_tokens=6)
            case "agenerate":
                await branch.agenerate(max_tokens=6)
            case "stream":
                list(branch.stream(max_tokens=6))
            case "astream":
                [piece async for piece in branch.astream(max_tokens=6)]
            case "score":
                branch.score([" good", " rather bad"])
        pytest.fail("the step was to fail")


@pytest.mark.parametrize("front", ["generate", "agenerate", "stream", "astream", "score"])
async def test_an_error_that_is_gone_holds_no_branch(
    front: str, monkeypatch: pytest.MonkeyPatch, no_collector: None
) -> None:
    """Its traceback names the frames that had the branch; they go with it, and wait for no search for cycles."""
    with scripted_engine(reply) as engine, engine.root("the plan") as root:
        fault = Fault()
        fault.wrap(monkeypatch, ScriptedRunner, "run")
        fault.at = 0
        await fail(root, front)
        await asyncio.sleep(0)  # the event loop has the error until its turn is over
        fault.error = RuntimeError("injected")
        assert engine.stats().branches == 1


def test_a_failed_step_leaves_every_branch_of_its_calls_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls in the step fail; what they generated is rolled back, and the same call then gives the same text."""
    with scripted_engine(reply) as engine:
        root = engine.root("the plan", seed=1)
        kids = root.fork(3)
        before = [kid.token_ids for kid in kids]
        fault = Fault()
        fault.wrap(monkeypatch, ScriptedRunner, "run")
        fault.at = 3
        with pytest.raises(StepFailed, match="injected"):
            engine.generate(kids, max_tokens=6, temperature=1.0)
        assert [kid.token_ids for kid in kids] == before
        assert [kid.status for kid in kids] == ["idle"] * 3
        again = [out.text for out in engine.generate(kids, max_tokens=6, temperature=1.0)]
        with scripted_engine(reply) as other:
            same = other.root("the plan", seed=1).fork(3)
            assert again == [out.text for out in other.generate(same, max_tokens=6, temperature=1.0)]
        engine.check_integrity()


def test_a_copy_whose_source_was_given_away_is_not_made_again() -> None:
    """A step fails after it wrote where a copy came from: the copy, and what lies below it, is computed again."""
    with scripted_engine(reply) as engine:
        branch = engine.root("the plan", seed=1).fork().append(" is long enough for this")
        child = branch.fork().append(" and goes on")
        wanted = [each.fork().generate(max_tokens=6).text for each in (branch, child)]
        runner = engine.core.loop._runner
        assert isinstance(runner, ScriptedRunner)
        copied, source = branch.record.tip.node.blocks[2], BlockId(90)
        slots = [source * 4, source * 4 + 1]
        for slot in slots:
            runner.tokens[slot], runner.positions[slot] = 7, 0
        batch = Batch([7, 7], [0, 1], slots, Plan(2, ()), [(source, copied)], [])
        engine.core.loop._recover(Step(batch, [], []), RuntimeError("injected"))
        assert branch.parent is not None
        assert engine.stats().physical_tokens == branch.parent.num_tokens
        assert [each.fork().generate(max_tokens=6).text for each in (branch, child)] == wanted
        engine.check_integrity()
