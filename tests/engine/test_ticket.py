"""Calls that are handed in first and waited for later."""

import asyncio
from collections.abc import Iterator

import pytest

import dendrite as dd
from dendrite.testing import scripted_engine


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    with scripted_engine(lambda text: " a long answer") as engine:
        yield engine
        engine.check_integrity()


def test_what_is_handed_in_together_shares_the_first_step(engine: dd.Engine) -> None:
    """Ten calls of a branch each take as many steps as one call of ten branches."""
    with engine.root("Say:") as root:
        branches = root.fork(10)
        engine.generate([root.fork()], max_tokens=1)
        before = engine.stats().steps
        with engine.together():
            tickets = [engine.submit([branch], max_tokens=5) for branch in branches]
        texts = [ticket.wait()[0].text for ticket in tickets]
        assert engine.stats().steps - before == 5
        assert texts == [" a lo"] * 10


async def test_tickets_end_one_by_one(engine: dd.Engine) -> None:
    """The short one is there while the long one still runs; a score may join."""
    with engine.root("Say:") as root:
        short, long = root.fork(2)
        tickets = [engine.submit([long], max_tokens=14), engine.submit([short], max_tokens=2)]
        done = asyncio.create_task(tickets[0].result())
        assert (await tickets[1].result())[0].text == " a"
        (scores,) = await engine.submit_score(short, [" long"], priority=1.0).result()
        assert len(scores) == 5
        assert (await done)[0].text == " a long answer"


def test_a_cancelled_ticket_rolls_back(engine: dd.Engine) -> None:
    """The branch is as it was, and cancelling once more does nothing."""
    with engine.root("Say:") as root:
        with engine.together():
            ticket = engine.submit([root])
            ticket.cancel()
        ticket.cancel()
        assert root.text == "Say:"
        assert root.status == "idle"


async def test_whoever_waits_for_a_call_that_has_ended_hears_at_once(engine: dd.Engine) -> None:
    """Threads and tasks, again and again, whichever came first."""
    with engine.root("Say:") as root:
        ticket = engine.submit([root], max_tokens=3)
        first = ticket.wait()
        assert ticket.wait() == first == await ticket.result() == await ticket.result()
        other = engine.submit([root], max_tokens=3)
        assert await other.result() == other.wait()


async def test_a_cancelled_call_is_cancelled_for_whoever_waits(engine: dd.Engine) -> None:
    """A thread at the gate and a task hear of it."""
    with engine.root("Say:") as root:
        with engine.together():  # nothing runs meanwhile
            ticket = engine.submit([root], max_tokens=200)
            thread = asyncio.create_task(asyncio.to_thread(ticket.wait))
            await asyncio.sleep(0.01)
            ticket.cancel()
        for waiting in (thread, ticket.result()):
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert root.text == "Say:"
