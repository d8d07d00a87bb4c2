"""Who runs and who is in a step: what fits, turns, priorities, chunks."""

from __future__ import annotations

import pytest

from dendrite.engine.blocks import BlockPool
from dendrite.engine.errors import OutOfBlocks
from dendrite.engine.nodes import Tip
from dendrite.engine.requests import GenerateRequest, Group
from dendrite.engine.scheduler import Scheduler
from dendrite.engine.step import Step
from dendrite.engine.swap import SwapSpace
from dendrite.engine.tree import KVTree
from tests.engine.list_mover import ListMover


def make(num_blocks: int = 64, block_size: int = 4, prefill_chunk: int = 16) -> tuple[KVTree, Scheduler]:
    """A tree and its scheduler."""
    tree = KVTree(BlockPool(num_blocks + 1, block_size))
    mover = ListMover([-1] * (num_blocks + 1) * block_size, block_size)
    swap = SwapSpace(mover, bytes_per_token=1, host_bytes=1000)
    return tree, Scheduler(tree, swap, prefill_chunk=prefill_chunk)


def generate(scheduler: Scheduler, *tips: Tip, max_tokens: int = 4) -> list[GenerateRequest]:
    """One call over the tips, submitted."""
    requests = [GenerateRequest(tip, max_tokens) for tip in tips]
    scheduler.submit(Group(requests))
    return requests


def step(scheduler: Scheduler) -> Step:
    """Schedules and commits one step."""
    found = scheduler.schedule()
    scheduler.commit(found, "hidden")
    return found


def test_a_long_prompt_is_computed_in_chunks() -> None:
    """40 tokens at 16 a step: 16, 16, 8, and only the last step has a row to read."""
    tree, scheduler = make()
    tip, _ = tree.new_root(list(range(40)))
    generate(scheduler, tip)
    steps = [step(scheduler) for _ in range(3)]
    assert [each.num_rows for each in steps] == [16, 16, 8]
    assert [len(each.reads) for each in steps] == [0, 0, 1]


def test_a_long_prompt_leaves_room_for_those_that_decode() -> None:
    """While a branch decodes, prefill takes a quarter of a chunk a step and the branch its token in each."""
    tree, scheduler = make()
    short, _ = tree.new_root([1, 2])
    (decoding,) = generate(scheduler, short, max_tokens=8)
    step(scheduler)
    long, _ = tree.new_root(list(range(40)))
    generate(scheduler, long)
    for _ in range(3):
        tree.extend(short, [7])
        found = step(scheduler)
        assert found.num_rows == 1 + 4
        assert [read.request for read in found.reads] == [decoding]


def test_what_can_never_fit_is_refused_at_once() -> None:
    """The refusal names needed, free and prunable blocks, and nothing is queued."""
    tree, scheduler = make(num_blocks=4)
    root, _ = tree.new_root([1, 2, 3])
    other, _ = tree.new_root([9, 9, 9, 9, 9])
    tree.place(other.node, 5)
    with pytest.raises(OutOfBlocks) as caught:
        generate(scheduler, root, max_tokens=18)
    assert (caught.value.needed, caught.value.free, caught.value.prunable) == (5, 2, 2)
    assert (root.status, scheduler.has_work) == ("idle", False)


def test_what_fits_of_a_call_runs_and_the_rest_follows_in_order() -> None:
    """Five branches of two blocks each in a pool of five, one of them the root's: two run, then as others end."""
    tree, scheduler = make(num_blocks=5)
    root, _ = tree.new_root([1, 2, 3, 4])
    requests = generate(scheduler, *[tree.fork(root) for _ in range(5)], max_tokens=8)
    later = generate(scheduler, tree.fork(root), max_tokens=1)
    step(scheduler)
    assert scheduler.running == requests[:2]
    scheduler.remove(requests[0])
    step(scheduler)
    assert scheduler.running == requests[1:3]  # the last one would fit, and still waits its turn
    for request in requests[1:]:
        scheduler.remove(request)
    step(scheduler)
    assert scheduler.running == later
    tree.check_integrity()


def test_what_fits_later_waits() -> None:
    """The second call needs what the first has reserved; it runs once the first has ended."""
    tree, scheduler = make(num_blocks=4)
    a, _ = tree.new_root([1])
    b, _ = tree.new_root([2])
    (first,) = generate(scheduler, a, max_tokens=12)
    assert step(scheduler).reads[0].request is first
    (second,) = generate(scheduler, b, max_tokens=12)
    tree.extend(a, [5])
    assert [read.request for read in step(scheduler).reads] == [first]
    assert b.status == "queued"
    scheduler.remove(first)
    assert [read.request for read in step(scheduler).reads] == [second]


def test_more_branches_than_a_step_holds_take_turns() -> None:
    """300 branches: 256 rows in the first step, and the 44 others are in the second."""
    tree, scheduler = make(num_blocks=2000)
    tips = [tree.new_root([token])[0] for token in range(300)]
    generate(scheduler, *tips, max_tokens=8)
    first = step(scheduler)
    for read in first.reads:
        tree.extend(read.request.tip, [1])
    second = step(scheduler)
    assert len(first.reads) == len(second.reads) == 256
    assert {id(read.request) for read in first.reads + second.reads} == set(map(id, scheduler.running))


def test_the_most_promising_call_is_admitted_first() -> None:
    """Where memory serves one at a time, calls wait by priority, and equal ones in the order they came."""
    tree, scheduler = make(num_blocks=4)
    tips = [tree.new_root([number, 1])[0] for number in range(4)]
    order: list[int] = []
    first = GenerateRequest(tips[0], 8)
    scheduler.submit(Group([first]))
    step(scheduler)
    waiting = [GenerateRequest(tip, 8) for tip in tips[1:]]
    for request, priority in zip(waiting, (1.0, 5.0, 1.0), strict=True):
        scheduler.submit(Group([request], priority=priority))
    for _ in waiting:
        ended = scheduler.running[0]
        scheduler.remove(ended)
        tree.prune(ended.tip)
        step(scheduler)
        order += [tips.index(request.tip) for request in scheduler.running]
    assert order == [2, 1, 3]


def test_prefill_goes_to_the_most_promising_call() -> None:
    """Of two long prompts the one of higher priority gets the chunk, though it came later."""
    tree, scheduler = make()
    dull, _ = tree.new_root(list(range(40)))
    bright, _ = tree.new_root(list(range(100, 140)))
    scheduler.submit(Group([GenerateRequest(dull, 4)]))
    scheduler.submit(Group([GenerateRequest(bright, 4)], priority=1.0))
    found = step(scheduler)
    assert found.batch is not None
    assert found.batch.token_ids == list(range(100, 116))
